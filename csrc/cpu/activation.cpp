// fastlm::gelu and its backward: tensors to the parameters of activation.h.
#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "dispatch.h"

namespace fastlm {
namespace {

// Of any strides; the result is contiguous, as every operand of the kernel.
Tensor run(const char* op, void (*const (&kernel)[kDTypes])(const GeluParams&), const Tensor& input,
           const Tensor* dout) {
  const DType dtype = dtype_of(input, op, "input");
  STD_TORCH_CHECK(dtype != kF64, "fastlm::", op, ": input must be float32, bfloat16 or float16");
  const Tensor x = fastlm::contiguous(input), dy = dout ? fastlm::contiguous(*dout) : Tensor();
  Tensor out = new_tensor(input.sizes(), input.scalar_type());
  kernel[dtype]({torch_pool(), input.numel(), x.const_data_ptr(), dout ? dy.const_data_ptr() : nullptr,
                 out.mutable_data_ptr()});
  return out;
}

Tensor gelu(const Tensor& input, bool tanh) { return run("gelu", kernels().activation.gelu[tanh], input, nullptr); }

Tensor gelu_backward(const Tensor& dout, const Tensor& input, bool tanh) {
  const char* op = "gelu_backward";
  check_same_dtype(dout, input, op, "dout");
  STD_TORCH_CHECK(dout.sizes() == input.sizes(), "fastlm::", op, ": dout has shape ", shape_string(dout), ", expected ",
                  shape_string(input));
  return run(op, kernels().activation.gelu_backward[tanh], input, &dout);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("gelu", TORCH_BOX(&fastlm::gelu));
  m.impl("gelu_backward", TORCH_BOX(&fastlm::gelu_backward));
}
