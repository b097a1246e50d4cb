// Binding of the cross-entropy operators, over logits and linear: layouts, target checks, reductions.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../loss.h"
#include "dispatch.h"

namespace fastlm {
namespace {

// The arguments that every form of the loss has, and the tensors that must outlive its pointers.
struct Loss {
  const char* op;
  int64_t N, C, S;
  ScalarType dtype, compute;
  int64_t reduction;
  TokenLoss token{};
  double denominator = 1;  // of a mean
  // class indices (contiguous) or probabilities, and what else the pointers point into
  std::optional<Tensor> target{}, weight{}, dloss{}, dlse{};

  bool probabilities() const { return token.target == nullptr; }
};

// Counts what a mean divides by; a target out of range is an error before any work.
void read_targets(Loss& l) {
  const int64_t count = l.N * l.S, ignore = l.token.ignore_index;
  const int64_t* y = l.target->const_data_ptr<int64_t>();
  const bool f64 = l.compute == ScalarType::Double;
  const void* w = l.token.weight;
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (y[i] == ignore) continue;
    STD_TORCH_CHECK(y[i] >= 0 && y[i] < l.C, "fastlm.", l.op, ": target ", y[i],
                    " is out of bounds for ", l.C, " classes (ignore_index is ", ignore, ")");
    total += !w ? 1 : f64 ? static_cast<const double*>(w)[y[i]] : static_cast<const float*>(w)[y[i]];
  }
  l.token.target = y;
  l.denominator = total;
}

// logits: shape (C), (N, C) or (N, C, d1, ...), which the target has too or lacks C of.
void set_target(Loss& l, const Tensor& target, Ints logits) {
  if (!has_probabilities(target, logits, l.dtype, l.op)) {
    l.target = fastlm::contiguous(target);
    return read_targets(l);
  }
  l.target = target;
  if (!merged_strides(*l.target, &l.token.probs_at)) {
    l.target = fastlm::contiguous(target);
    merged_strides(*l.target, &l.token.probs_at);
  }
  l.token.probs = l.target->const_data_ptr();
  l.denominator = double(l.N * l.S);
}

void set_weight(Loss& l, const std::optional<Tensor>& weight) {
  l.token.weight_sum = double(l.C);
  if (!weight) return;
  check_dtype(*weight, l.compute, l.op, "weight");
  check_shape(*weight, {l.C}, l.op, "weight");
  l.weight = fastlm::contiguous(*weight);
  l.token.weight = l.weight->const_data_ptr();
  const bool f64 = l.compute == ScalarType::Double;
  double sum = 0;
  for (int64_t c = 0; c < l.C; ++c)
    sum += f64 ? static_cast<const double*>(l.token.weight)[c] : static_cast<const float*>(l.token.weight)[c];
  l.token.weight_sum = sum;
}

Loss read_loss(const char* op, Ints logits, ScalarType dtype, const Tensor& target,
               const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
               double label_smoothing, double z_loss, double softcap) {
  check_reduction(reduction, op);
  const auto [N, C, S] = logits_size(op, logits);
  Loss l{op, N, C, S, dtype, compute_type(dtype), reduction};
  l.token.ignore_index = ignore_index;
  l.token.label_smoothing = label_smoothing;
  l.token.z_loss = z_loss;
  l.token.softcap = softcap;
  set_weight(l, weight);
  set_target(l, target, logits);
  return l;
}

// The upstream gradients of the loss and, if given, of lse.
void set_upstream(Loss& l, const Tensor& dloss, const std::optional<Tensor>& dlse) {
  const Tensor upstream =
      dloss.scalar_type() == l.compute ? dloss : torch::stable::to(dloss, l.compute);
  const bool f64 = l.compute == ScalarType::Double;
  if (l.reduction == kNone) {
    STD_TORCH_CHECK(dloss.numel() == l.N * l.S, "fastlm::", l.op, ": dloss has shape ", shape_string(dloss));
    l.dloss = fastlm::contiguous(upstream);
    l.token.dloss = l.dloss->const_data_ptr();
    l.token.scale = 1;
  } else {
    check_shape(dloss, {}, l.op, "dloss");
    const double g = f64 ? *upstream.const_data_ptr<double>() : *upstream.const_data_ptr<float>();
    l.token.scale = g / (l.reduction == kMean ? l.denominator : 1);
  }
  if (!dlse) return;
  check_dtype(*dlse, l.compute, l.op, "dlse");
  STD_TORCH_CHECK(dlse->numel() == l.N * l.S, "fastlm::", l.op, ": dlse has shape ", shape_string(*dlse));
  l.dlse = fastlm::contiguous(*dlse);
  l.token.dlse = l.dlse->const_data_ptr();
}

// The forward's lse or low for the backward; the result must outlive the kernel.
Tensor saved(const Loss& l, const Tensor& values, void** data) {
  check_dtype(values, l.compute, l.op, "lse");
  STD_TORCH_CHECK(values.numel() == l.N * l.S, "fastlm::", l.op, ": lse has shape ", shape_string(values));
  const Tensor rows = fastlm::contiguous(values);
  *data = const_cast<void*>(rows.const_data_ptr());
  return rows;
}

template <class T> Tensor reduced(const Loss& l, const Tensor& loss) {
  const T* x = static_cast<const T*>(loss.const_data_ptr());
  double sums[8] = {};  // so that none waits for the one before
  for (int64_t i = 0; i < l.N * l.S; ++i) sums[i % 8] += double(x[i]);
  double sum = 0;
  for (double each : sums) sum += each;
  Tensor result = new_tensor({}, l.compute);
  *static_cast<T*>(result.mutable_data_ptr()) = T(l.reduction == kMean ? sum / l.denominator : sum);
  return result;
}

// loss [N][S] of the compute type, reduced and in the dtype that the caller asks for.
Tensor finish_loss(const Loss& l, const Tensor& loss, bool full_precision) {
  Tensor result = l.reduction == kNone                 ? loss
                  : l.compute == ScalarType::Double ? reduced<double>(l, loss)
                                                    : reduced<float>(l, loss);
  if (full_precision || l.dtype == l.compute) return result;
  return torch::stable::to(result, l.dtype);
}

// ---- over logits ----

void set_logits(CrossEntropyParams& p, const Loss& l, const Tensor& input, Logits* view) {
  if (!view_logits(input, l.N, l.S, view)) view_logits(torch::stable::contiguous(input), l.N, l.S, view);
  p.N = view->N;
  p.C = l.C;
  p.S = view->S;
  p.rows = view->rows;
  p.input = view->tensor->const_data_ptr();
  p.input_at = view->at;
  p.token = l.token;
  if (l.probabilities() && view->N != l.N) p.token.probs_at = {0, l.token.probs_at.c, l.token.probs_at.n};
  p.pool = torch_pool();
}

// Runs with the gradient in a tensor laid out like input, through a temporary where the kernel can't
// write such a layout beside the one that it reads.
Tensor run(CrossEntropyParams& p, const Loss& l, const Tensor& input, DType dtype, bool gradient) {
  const auto kernel = kernels().cross_entropy.run[dtype];
  if (!gradient) {
    kernel(p);
    return new_tensor({0}, l.dtype);
  }
  Tensor dinput = new_like(input);
  Logits view;
  if (view_logits(dinput, l.N, l.S, &view) && view.rows == p.rows && view.N == p.N) {
    p.dinput = dinput.mutable_data_ptr();
    p.dinput_at = view.at;
    kernel(p);
    return dinput;
  }
  const Tensor plain = torch::stable::contiguous(input);
  Logits source, result;
  set_logits(p, l, plain, &source);
  const Tensor temporary = new_like(plain);
  view_logits(temporary, l.N, l.S, &result);
  p.dinput = temporary.mutable_data_ptr();
  p.dinput_at = result.at;
  kernel(p);
  torch::stable::copy_(dinput, temporary);
  return dinput;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool return_lse,
    bool full_precision, bool gradient) {
  const DType dtype = dtype_of(input, "cross_entropy", "input");
  const auto logits = input.sizes();
  Loss l = read_loss("cross_entropy", logits, input.scalar_type(), target, weight, reduction,
                     ignore_index, label_smoothing, z_loss, softcap);
  STD_TORCH_CHECK(!gradient || (reduction != kNone && !return_lse),
                  "fastlm::cross_entropy: the upstream gradient is known for a scalar loss alone");
  const std::vector<int64_t> shape = token_shape(logits);
  const Ints tokens(shape.data(), shape.size());
  const Tensor loss = new_tensor(tokens, l.compute), lse = new_tensor(tokens, l.compute);
  const Tensor low = new_tensor(tokens, l.compute);
  l.token.loss = loss.mutable_data_ptr();
  l.token.lse = lse.mutable_data_ptr();
  l.token.low = low.mutable_data_ptr();
  l.token.lse_everywhere = return_lse;
  l.token.scale = reduction == kMean ? 1 / l.denominator : 1;
  CrossEntropyParams p{};
  Logits view;
  set_logits(p, l, input, &view);
  p.forward = true;
  const Tensor dinput = run(p, l, input, dtype, gradient);
  return {finish_loss(l, loss, full_precision), lse, low, dinput};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(
    const Tensor& dloss, const std::optional<Tensor>& dlse, const Tensor& input, const Tensor& target,
    const std::optional<Tensor>& weight, const Tensor& lse, const Tensor& low, int64_t reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, bool input_gradient, bool target_gradient) {
  const DType dtype = dtype_of(input, "cross_entropy_backward", "input");
  Loss l = read_loss("cross_entropy_backward", input.sizes(), input.scalar_type(), target, weight,
                     reduction, ignore_index, label_smoothing, z_loss, softcap);
  set_upstream(l, dloss, dlse);
  const Tensor lse_rows = saved(l, lse, &l.token.lse), low_rows = saved(l, low, &l.token.low);
  CrossEntropyParams p{};
  Logits view;
  set_logits(p, l, input, &view);
  Tensor dtarget = new_tensor({0}, l.dtype);
  if (target_gradient) {
    STD_TORCH_CHECK(l.probabilities(), "fastlm::", l.op, ": class indices have no gradient");
    dtarget = new_tensor(target.sizes(), l.dtype);
    p.dprobs = dtarget.mutable_data_ptr();
    merged_strides(dtarget, &p.dprobs_at);
    if (view.N != l.N) p.dprobs_at = {0, p.dprobs_at.c, p.dprobs_at.n};
  }
  const Tensor dinput = run(p, l, input, dtype, input_gradient);
  return {dinput, dtarget};
}

// ---- linear ----

struct Linear {
  std::vector<int64_t> logits;  // shape of the logits that never exist
  Tensor input, linear_weight;
  std::optional<Tensor> linear_bias, dinput{}, dlinear_weight{}, dlinear_bias{};
  DType dtype;
  LinearCrossEntropyParams params{};
};

Linear read_linear(const char* op, const Tensor& input, const Tensor& linear_weight,
                   const std::optional<Tensor>& linear_bias) {
  const DType dtype = dtype_of(input, op, "input");
  Linear l{linear_logits(op, input, linear_weight, linear_bias), fastlm::contiguous(input),
           fastlm::contiguous(linear_weight), {}, {}, {}, {}, dtype};
  if (linear_bias) {
    l.linear_bias = fastlm::contiguous(*linear_bias);
    l.params.linear_bias = l.linear_bias->const_data_ptr();
  }
  l.params.D = input.size(input.dim() - 1);
  l.params.input = l.input.const_data_ptr();
  l.params.linear_weight = l.linear_weight.const_data_ptr();
  return l;
}

// Runs the kernel; the gradients that were not asked for are empty.
void run_linear(Linear& l, const Loss& loss, bool dinput, bool dweight, bool dbias) {
  LinearCrossEntropyParams& p = l.params;
  const auto output = [&](const Tensor* like, void** data) {
    if (!like) return new_tensor({0}, loss.dtype);
    Tensor t = new_like(*like);
    *data = t.mutable_data_ptr();
    return t;
  };
  l.dinput = output(dinput ? &l.input : nullptr, &p.dinput);
  l.dlinear_weight = output(dweight ? &l.linear_weight : nullptr, &p.dlinear_weight);
  l.dlinear_bias = output(dbias && l.linear_bias ? &*l.linear_bias : nullptr, &p.dlinear_bias);
  p.pool = torch_pool();
  p.N = loss.N;
  p.C = loss.C;
  p.S = loss.S;
  p.token = loss.token;
  const auto& table = kernels().linear_cross_entropy;
  const Tensor scratch = new_tensor({table.scratch_bytes[l.dtype](p)}, ScalarType::Byte);
  p.scratch = scratch.mutable_data_ptr();
  table.run[l.dtype](p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool full_precision,
    bool input_gradient, bool weight_gradient, bool bias_gradient) {
  const char* op = "linear_cross_entropy";
  Linear linear = read_linear(op, input, linear_weight, linear_bias);
  Loss l = read_loss(op, Ints(linear.logits.data(), linear.logits.size()), input.scalar_type(), target,
                     weight, reduction, ignore_index, label_smoothing, z_loss, softcap);
  STD_TORCH_CHECK(reduction != kNone || !(input_gradient || weight_gradient || bias_gradient),
                  "fastlm::linear_cross_entropy: the upstream gradient is known for a scalar loss alone");
  const std::vector<int64_t> shape = token_shape(Ints(linear.logits.data(), linear.logits.size()));
  const Ints tokens(shape.data(), shape.size());
  const Tensor loss = new_tensor(tokens, l.compute), lse = new_tensor(tokens, l.compute);
  const Tensor low = new_tensor(tokens, l.compute);
  l.token.loss = loss.mutable_data_ptr();
  l.token.lse = lse.mutable_data_ptr();
  l.token.low = low.mutable_data_ptr();
  l.token.lse_everywhere = true;
  l.token.scale = reduction == kMean ? 1 / l.denominator : 1;
  linear.params.forward = true;
  run_linear(linear, l, input_gradient, weight_gradient, bias_gradient);
  return {finish_loss(l, loss, full_precision), lse, low, *linear.dinput, *linear.dlinear_weight,
          *linear.dlinear_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& dloss, const std::optional<Tensor>& dlse, const Tensor& input,
    const Tensor& linear_weight, const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& lse, const Tensor& low, int64_t reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, bool input_gradient, bool weight_gradient,
    bool bias_gradient) {
  const char* op = "linear_cross_entropy_backward";
  Linear linear = read_linear(op, input, linear_weight, linear_bias);
  Loss l = read_loss(op, Ints(linear.logits.data(), linear.logits.size()), input.scalar_type(), target,
                     weight, reduction, ignore_index, label_smoothing, z_loss, softcap);
  set_upstream(l, dloss, dlse);
  const Tensor lse_rows = saved(l, lse, &l.token.lse), low_rows = saved(l, low, &l.token.low);
  run_linear(linear, l, input_gradient, weight_gradient, bias_gradient);
  return {*linear.dinput, *linear.dlinear_weight, *linear.dlinear_bias};
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace
}  // namespace fastlm
