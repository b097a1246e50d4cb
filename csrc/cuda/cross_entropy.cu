// fastlm::cross_entropy and its backward on a GPU: tensors to the parameters of cross_entropy.cuh.
//
// Nothing that the device computes is read by the host: what a mean divides by, and whether a target is
// out of bounds, stay there. The latter stops the device as an assertion does in PyTorch.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

namespace fastlm::cuda {

// ---- class Loss ----------------------------------------------------------------------------

Loss::Loss(Device& device, const char* op, Ints logits, const Tensor& like, const Tensor& target,
           const OptionalTensor& weight, const LossOptions& options)
    : size(logits_size(op, logits)),
      dtype(like.scalar_type()),
      compute(compute_type(dtype)),
      device_(device),
      op_(op),
      like_(like),
      scalars_(new_like(like, {kScalars}, ScalarType::Double)),
      reduction_(options.reduction),
      shape_(token_shape(logits)) {
  check_reduction(reduction_, op);
  STD_TORCH_CHECK(size.C <= kMostClasses, "fastlm::", op, ": ", size.C, " classes, expected at most ",
                  kMostClasses);
  token.ignore_index = options.ignore_index;
  token.label_smoothing = options.label_smoothing;
  token.z_loss = options.z_loss;
  token.softcap = options.softcap;
  set_target(target, logits);
  if (weight) set_weight(*weight);
}

void* Loss::scalar(Scalar which) const { return static_cast<double*>(scalars_.mutable_data_ptr()) + which; }

void Loss::set_target(const Tensor& target, Ints logits) {
  check_device(target, like_, op_, "target");
  if (!has_probabilities(target, logits, dtype, op_)) {
    held_.push_back(fastlm::contiguous(target));
    token.target = held_.back().const_data_ptr<int64_t>();
    return;
  }
  held_.push_back(target);
  if (!merged_strides(target, &token.probs_at)) {
    held_.back() = fastlm::contiguous(target);
    merged_strides(held_.back(), &token.probs_at);
  }
  token.probs = held_.back().const_data_ptr();
}

void Loss::set_weight(const Tensor& weight) {
  check_device(weight, like_, op_, "weight");
  check_dtype(weight, compute, op_, "weight");
  check_shape(weight, {size.C}, op_, "weight");
  held_.push_back(fastlm::contiguous(weight));
  token.weight = held_.back().const_data_ptr();
  if (!token.target || token.label_smoothing == 0) return;
  SumParams p = sum_of(kValues, size.C);
  p.values = token.weight;
  p.result = scalar(kWeightSum);
  p.result_type = compute == ScalarType::Double ? kF64 : kF32;
  sum(p);
  token.weight_sum = p.result;
}

SumParams Loss::sum_of(SumOf of, int64_t count) const {
  SumParams p{};
  p.of = of;
  p.count = count;
  return p;
}

// In one block, or in up to 256 whose sums another one adds.
void Loss::sum(SumParams p) {
  constexpr size_t kShared = 2 * sizeof(double) * kSumThreads / 32;
  const auto kernel = compute == ScalarType::Double ? sum_tokens<double> : sum_tokens<float>;
  const int64_t blocks = std::clamp<int64_t>(ceil_div(p.count, 16 * kSumThreads), 1, 256);
  OptionalTensor partials;
  if (blocks > 1) {
    partials = new_like(like_, {2 * blocks}, ScalarType::Double);
    p.partials = static_cast<double*>(partials->mutable_data_ptr());
    device_.launch(kernel, dim3(unsigned(blocks)), kSumThreads, kShared, p);
    p.of = kPartials;
    p.count = blocks;
  }
  device_.launch(kernel, dim3(1), kSumThreads, kShared, p);
}

// Sums what the loss is divided by: class weights of tokens or their number for a mean, else 1.
SumParams Loss::denominator() const {
  SumParams p = sum_of(token.target ? kTargets : kValues, token.target ? size.N * size.S : 0);
  p.target = token.target;
  p.weight = token.weight;
  p.C = size.C;
  p.ignore_index = token.ignore_index;
  if (!token.target) p.start = double(size.N * size.S);
  p.total = static_cast<double*>(scalar(kTotal));
  return p;
}

void Loss::set_scale(SumParams& p, bool apart) {
  p.scale = scalar(kScale);
  p.finite_scale = apart;
  (apart ? scale_apart : token.scale) = p.scale;
}

void Loss::start_forward(bool gradient, bool apart) {
  STD_TORCH_CHECK(!gradient || reduction_ != kNone, "fastlm::", op_,
                  ": the upstream gradient is known for a scalar loss alone");
  loss_ = new_like(like_, shape_, compute);
  lse = new_like(like_, shape_, compute);
  low = new_like(like_, shape_, compute);
  token.loss = loss_->mutable_data_ptr();
  token.lse = lse.mutable_data_ptr();
  token.low = low.mutable_data_ptr();
  if (!token.target && reduction_ != kMean) return;
  SumParams p = denominator();
  p.inside = static_cast<double*>(scalar(kInside));
  if (gradient && reduction_ == kMean) set_scale(p, apart);
  sum(p);
  if (token.target) assert_targets();
}

void Loss::assert_targets() {
  const auto message = [&] {
    return std::string("fastlm.") + op_ + ": a target is out of bounds for " + std::to_string(size.C) +
           " classes (ignore_index is " + std::to_string(token.ignore_index) + ")";
  };
#ifdef __CUDACC__
  const Tensor inside = torch::stable::narrow(scalars_, 0, kInside, 1);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(inside), torch::stable::detail::from(message())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_assert_async", "msg", stack.data(), TORCH_ABI_VERSION));
#else
  STD_TORCH_CHECK(simt::gpu.listing || *static_cast<const double*>(scalar(kInside)) != 0, message());
#endif
}

// Values of each token for a backward, of the compute dtype.
const void* Loss::per_token(const Tensor& t, const char* name) {
  check_dtype(t, compute, op_, name);
  check_device(t, like_, op_, name);
  STD_TORCH_CHECK(t.numel() == size.N * size.S, "fastlm::", op_, ": ", name, " has shape ", shape_string(t));
  held_.push_back(fastlm::contiguous(t));
  return held_.back().const_data_ptr();
}

void Loss::start_backward(const Tensor& dloss, const OptionalTensor& dlse, const Tensor& lse, const Tensor& low,
                          bool apart) {
  token.lse = const_cast<void*>(per_token(lse, "lse"));
  token.low = const_cast<void*>(per_token(low, "low"));
  if (dlse) token.dlse = per_token(*dlse, "dlse");
  if (reduction_ == kNone) {
    const Tensor upstream = dloss.scalar_type() == compute ? dloss : torch::stable::to(dloss, compute);
    token.dloss = per_token(upstream, "dloss");
    return;
  }
  check_shape(dloss, {}, op_, "dloss");
  check_device(dloss, like_, op_, "dloss");
  SumParams p = denominator();
  if (reduction_ == kSum) {
    p.count = 0;
    p.start = 1;
  }
  p.dloss = dloss.const_data_ptr();
  p.dloss_type = dtype_of(dloss, op_, "dloss");
  set_scale(p, apart && !dlse);
  sum(p);
}

Tensor Loss::reduced(bool full_precision) {
  const ScalarType type = full_precision ? compute : dtype;
  if (reduction_ == kNone) return type == compute ? *loss_ : torch::stable::to(*loss_, type);
  const Tensor result = new_like(like_, {}, type);
  SumParams p = sum_of(kValues, size.N * size.S);
  p.values = token.loss;
  p.result = result.mutable_data_ptr();
  p.result_type = dtype_of(result, op_, "loss");
  if (reduction_ == kMean) p.denominator = static_cast<const double*>(scalar(kTotal));
  sum(p);
  return result;
}

// ---- over logits ---------------------------------------------------------------------------

void run_cross_entropy(Device& device, const CrossEntropyParams& p, DType dtype, bool rows) {
  switch (dtype) {
    case kF64: return launch_cross_entropy<double, double>(device, p, rows);
    case kF32: return launch_cross_entropy<float, float>(device, p, rows);
    case kBF16: return launch_cross_entropy<bf16, bf16>(device, p, rows);
    case kF16: return launch_cross_entropy<f16, f16>(device, p, rows);
    default: STD_TORCH_CHECK(false, "fastlm::cross_entropy: no kernel for this dtype");
  }
}

namespace {

void set_logits(CrossEntropyParams& p, const Loss& l, const Tensor& input, Logits* view) {
  if (!view_logits(input, l.size.N, l.size.S, view))
    view_logits(torch::stable::contiguous(input), l.size.N, l.size.S, view);
  p.N = view->N;
  p.C = int(l.size.C);
  p.S = view->S;
  p.input = view->tensor->const_data_ptr();
  p.input_at = view->at;
  p.token = l.token;
  if (l.probabilities() && view->N != l.size.N) p.token.probs_at = {0, l.token.probs_at.c, l.token.probs_at.n};
}

// Strides as the kernel numbers tokens, [N][C][S] or [1][C][N].
bool set_gradient(const CrossEntropyParams& p, const Loss& l, const Tensor& t, Strides* at) {
  if (!merged_strides(t, at)) return false;
  if (p.N != l.size.N) *at = {0, at->c, at->n};
  return true;
}

// Runs with the gradient in a tensor laid out like input, through a temporary where its trailing
// dimensions are not one.
Tensor run(Device& device, CrossEntropyParams& p, const Loss& l, const Tensor& input, DType dtype, bool gradient) {
  Logits view;
  set_logits(p, l, input, &view);
  if (!gradient) {
    run_cross_entropy(device, p, dtype, view.rows);
    return new_like(input, {0}, l.dtype);
  }
  Tensor dinput = torch::stable::empty_like(input), written = dinput;
  if (!set_gradient(p, l, dinput, &p.dinput_at)) {
    written = new_like(input, {input.sizes().begin(), input.sizes().end()}, l.dtype);
    set_gradient(p, l, written, &p.dinput_at);
  }
  p.dinput = written.mutable_data_ptr();
  run_cross_entropy(device, p, dtype, view.rows);
  if (written.get() != dinput.get()) torch::stable::copy_(dinput, written);
  return dinput;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool return_lse,
    bool full_precision, bool gradient) {
  const DType dtype = dtype_of(input, "cross_entropy", "input");
  STD_TORCH_CHECK(!gradient || !return_lse,
                  "fastlm::cross_entropy: the upstream gradient of lse is not known in the forward");
  Device device(input, "cross_entropy");
  Loss l(device, "cross_entropy", input.sizes(), input, target, weight,
         {reduction, ignore_index, label_smoothing, z_loss, softcap});
  l.start_forward(gradient, false);
  l.token.lse_everywhere = return_lse;
  CrossEntropyParams p{};
  p.forward = true;
  const Tensor dinput = run(device, p, l, input, dtype, gradient);
  return {l.reduced(full_precision), l.lse, l.low, dinput};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(
    const Tensor& dloss, const OptionalTensor& dlse, const Tensor& input, const Tensor& target,
    const OptionalTensor& weight, const Tensor& lse, const Tensor& low, int64_t reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, bool input_gradient, bool target_gradient) {
  const DType dtype = dtype_of(input, "cross_entropy_backward", "input");
  Device device(input, "cross_entropy_backward");
  Loss l(device, "cross_entropy_backward", input.sizes(), input, target, weight,
         {reduction, ignore_index, label_smoothing, z_loss, softcap});
  l.start_backward(dloss, dlse, lse, low, false);
  CrossEntropyParams p{};
  Tensor dtarget = new_like(input, {0}, l.dtype);
  if (target_gradient) {
    STD_TORCH_CHECK(l.probabilities(), "fastlm::cross_entropy_backward: class indices have no gradient");
    dtarget = new_like(input, {target.sizes().begin(), target.sizes().end()}, l.dtype);
    Logits view;
    set_logits(p, l, input, &view);
    set_gradient(p, l, dtarget, &p.dprobs_at);
    p.dprobs = dtarget.mutable_data_ptr();
  }
  return {run(device, p, l, input, dtype, input_gradient), dtarget};
}

// Gradients as the forward made them: dense, of any layout.
void scale(const std::vector<Tensor>& gradients, const Tensor& factor) {
  const char* const op = "scale_";
  check_shape(factor, {}, op, "factor");
  Device device(factor, op);
  for (const Tensor& x : gradients) {
    int64_t last = 0;
    for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
    ScaleParams p{x.mutable_data_ptr(), x.numel(), factor.const_data_ptr(), dtype_of(factor, op, "factor")};
    if (p.count == 0) continue;
    check_device(factor, x, op, "factor");
    STD_TORCH_CHECK(last + 1 == p.count && reinterpret_cast<uintptr_t>(p.x) % 16 == 0, "fastlm::", op,
                    ": a gradient has gaps, or does not start at a multiple of 16 bytes");
    const int64_t blocks = ceil_div(p.count * int64_t(x.element_size()), 16 * kScaleThreads);
    const dim3 grid(unsigned(std::min<int64_t>(blocks, 8 * device.multiprocessors)));
    switch (x.scalar_type()) {  // not float16, whose gradients wait for the factor
      case ScalarType::Double: device.launch(scale_gradient<double>, grid, kScaleThreads, 0, p); break;
      case ScalarType::Float: device.launch(scale_gradient<float>, grid, kScaleThreads, 0, p); break;
      case ScalarType::BFloat16: device.launch(scale_gradient<bf16>, grid, kScaleThreads, 0, p); break;
      default: STD_TORCH_CHECK(false, "fastlm::", op, ": no kernel for this dtype");
    }
  }
}

FASTLM_OPERATORS(m) {
  m.impl("scale_", TORCH_BOX(&scale));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace
}  // namespace fastlm::cuda
