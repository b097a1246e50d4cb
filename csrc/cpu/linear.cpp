// fastlm::linear, fastlm::sum_rows: tensors to the parameters of linear.h. fastlm::new_empty: memory for products of
// torch's.
#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "dispatch.h"

namespace fastlm {
namespace {

using Optional = std::optional<Tensor>;

// input (M, K), weight (N, K) without gaps along one of its dimensions, scale and bias (N); returns (M, N).
Tensor linear(const Tensor& input, const Tensor& weight, const Optional& scale, const Optional& bias) {
  const char* op = "linear";
  const DType dtype = dtype_of(input, op, "input");
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(input.dim() == 2, "fastlm::linear: input has shape ", shape_string(input), ", expected (M, K)");
  STD_TORCH_CHECK(weight.dim() == 2, "fastlm::linear: weight has shape ", shape_string(weight), ", expected (N, K)");
  const int64_t M = input.size(0), K = input.size(1), N = weight.size(0);
  check_shape(weight, {N, K}, op, "weight");
  if (!int8) check_dtype(weight, input.scalar_type(), op, "weight");
  STD_TORCH_CHECK(int8 == scale.has_value(), "fastlm::linear: scale must be given for an int8 weight, and only then");
  for (const auto& [vector, name] : {std::pair(&scale, "scale"), std::pair(&bias, "bias")})
    if (*vector) {
      check_dtype(**vector, input.scalar_type(), op, name);
      check_shape(**vector, {N}, op, name);
    }
  Tensor out = new_tensor({M, N}, input.scalar_type());
  if (M == 0 || N == 0) return out;

  const Tensor x = fastlm::contiguous(input);
  const bool by_rows = weight.stride(1) == 1 || K <= 1, by_columns = !by_rows && weight.stride(0) == 1;
  const Tensor w = by_rows || by_columns ? weight : torch::stable::contiguous(weight);
  const auto values = [](const Optional& v) { return v ? std::optional(fastlm::contiguous(*v)) : std::nullopt; };
  const Optional scales = values(scale), biases = values(bias);
  const auto data = [](const Optional& v) { return v ? v->const_data_ptr() : nullptr; };
  const FewTokensParams p{torch_pool(), M, K, N, x.const_data_ptr(), w.const_data_ptr(), w.stride(by_columns ? 1 : 0),
                       by_columns, data(scales), data(biases), out.mutable_data_ptr(), N};
  const LinearKernels& k = kernels().linear;
  (int8 ? k.int8 : k.plain)[dtype](p);
  return out;
}

// input (M, N); returns (N) of the compute type.
Tensor sum_rows(const Tensor& input) {
  const DType dtype = dtype_of(input, "sum_rows", "input");
  STD_TORCH_CHECK(input.dim() == 2, "fastlm::sum_rows: input has shape ", shape_string(input), ", expected (M, N)");
  const Tensor x = fastlm::contiguous(input);
  Tensor out = new_tensor({input.size(1)}, compute_type(input.scalar_type()));
  kernels().linear.sum_rows[dtype](
      {torch_pool(), input.size(0), input.size(1), x.const_data_ptr(), out.mutable_data_ptr()});
  return out;
}

// As torch's, in kept memory where it is large.
Tensor new_empty(const Tensor&, std::vector<int64_t> size, ScalarType dtype) {
  return new_tensor(Ints(size.data(), size.size()), dtype);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("linear", TORCH_BOX(&fastlm::linear));
  m.impl("sum_rows", TORCH_BOX(&fastlm::sum_rows));
  m.impl("new_empty", TORCH_BOX(&fastlm::new_empty));
}
