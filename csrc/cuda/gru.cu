// fastlm::gru_layer and its backward on a GPU: the input's products for all steps, the walk through time
// (gru.cuh), and after it the products that give the gradients of weights and input.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gru_backward.cuh"
#include "gru_forward.cuh"
#include "gru_walk.h"
#include "tensors.h"

namespace fastlm::cuda::gru {
namespace {

using torch::stable::select;
using torch::stable::transpose;

// Elements first ... first + n along a dimension.
Tensor part(Tensor t, int64_t dim, int64_t first, int64_t n) { return torch::stable::narrow(t, dim, first, n); }

Tensor shaped(const Tensor& t, std::initializer_list<int64_t> size) {
  return torch::stable::view(t, torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()));
}

// ---- forward -------------------------------------------------------------------------------

template <class S> GruNormParams<S> norm_params(const GruParams& p, int64_t d) {
  GruNormParams<S> n{};
  n.N = p.N;
  n.width = 3 * p.H;
  n.gain = static_cast<const S*>(p.weights[d].g_ih);
  n.normed = p.normed ? static_cast<float*>(p.normed) + d * p.N * 6 * p.H : nullptr;
  n.rstd = p.rstd ? static_cast<float*>(p.rstd) + d * p.N * 2 : nullptr;
  return n;
}

// x W of all steps, [D][N] rows of `sums`; normalised, with layer norm.
template <class S> void input_products(Device& device, const GruCall& call, const Tensor& sums) {
  const GruParams& p = call.p;
  const Tensor x = shaped(call.input, {p.N, p.I});
  for (int64_t d = 0; d < p.D; ++d) {
    const Tensor rows = select(sums, 0, d);
    product(part(rows, 1, 0, 3 * p.H), x, transpose(call.weights[size_t(d * call.per_direction)], 0, 1));
    if (!p.weights[d].g_ih) continue;
    GruNormParams<S> n = norm_params<S>(p, d);
    n.y = static_cast<float*>(rows.mutable_data_ptr());
    n.y_row = rows.size(1);
    device.launch(gru_norm<S>, dim3(unsigned(p.N)), 256, 16 * sizeof(float), n);
  }
}

template <class S> void forward(Device& device, const GruCall& call, const Tensor& gates) {
  const GruParams& p = call.p;
  const bool layer_norm = p.weights[0].g_hh, save = p.gates;
  Walk<S, 3, 8> walk(device, call, p.H);
  walk.choose(gru_forward<S>);
  const Tensor sums = save ? gates : call.make({p.D, p.N, 3 * p.H}, ScalarType::Float);

  GruForwardParams<S> f{};
  f.x = static_cast<float*>(sums.mutable_data_ptr());
  f.x_row = sums.size(2);
  f.save = save;
  f.zoneout = p.update || p.zoneout != 0;
  f.keep_change = float(1 - p.zoneout);
  f.update = static_cast<const S*>(p.update);
  f.h0 = static_cast<const S*>(p.h0);
  f.out = static_cast<S*>(p.out);
  f.hn = static_cast<S*>(p.hn);
  f.normed = static_cast<float*>(p.normed);
  f.rstd = static_cast<float*>(p.rstd);
  GruPackParams<S> pack{};
  const auto lay = [&](Arena arena) {
    walk.take(arena, layer_norm);
    f.state = arena.take<float>(p.D * p.B * p.H);
    f.raw = arena.take<float>(layer_norm ? p.D * p.B * 3 * p.H : 0);
    pack.bias = p.weights[0].b_ih ? arena.take<float>(p.D * 4 * p.H) : nullptr;
    return arena.used;
  };
  const Tensor memory = call.make({lay(Arena{nullptr})}, ScalarType::Byte);
  lay(Arena{static_cast<char*>(memory.mutable_data_ptr())});
  f.bias = pack.bias;
  walk.prepare(call);

  walk.set(pack, call);
  pack.by_gate = true;
  pack.row_stride = pack.K = p.H;
  pack.k_stride = 1;
  pack.h0 = f.h0;
  for (int64_t d = 0; d < p.D; ++d) {
    pack.b_ih[d] = static_cast<const S*>(p.weights[d].b_ih);
    pack.b_hh[d] = static_cast<const S*>(p.weights[d].b_hh);
    f.gain[d] = static_cast<const S*>(p.weights[d].g_hh);
  }
  device.launch(gru_pack<S>, dim3(unsigned(ceil_div(pack.items(), 256))), 256, 0, pack);
  input_products<stored_t<S>>(device, call, sums);
  walk.launch(gru_forward<S>, gru_forward_step<S>, f, p.T, layer_norm);
}

// ---- backward ------------------------------------------------------------------------------

// What the walk leaves for the products behind it.
struct Deltas {
  Tensor dx;        // (N, D, 3H) S, of x W + b
  Tensor dq;        // (D, N, H) S, the gate n of the gradient of h W; with layer norm (D, N, 3H), all of it
  Tensor previous;  // (D, N, H) S, the states before; empty unless the weights' gradients are wanted
  Tensor outer;     // (D, N, 3H) float32, the gradient of the norm of h W; empty without layer norm

  Deltas(const GruCall& call, bool layer_norm, bool weights_wanted)
      : dx(call.make({call.p.N, call.p.D, 3 * call.p.H}, call.scalar)),
        dq(call.make({call.p.D, call.p.N, (layer_norm ? 3 : 1) * call.p.H}, call.scalar)),
        previous(call.make({weights_wanted ? call.p.D : 0, call.p.N, call.p.H}, call.scalar)),
        outer(call.make({layer_norm ? call.p.D : 0, call.p.N, 3 * call.p.H}, ScalarType::Float)) {}
};

template <class S>
void walk_back(Device& device, const GruCall& call, const GruKept& kept, const Tensor& dh0, const Deltas& deltas) {
  const GruParams& p = call.p;
  const bool layer_norm = p.weights[0].g_hh;
  Walk<S, 2, 16> walk(device, call, 3 * p.H);
  walk.choose(gru_backward<S>);

  GruBackwardParams<S> b{};
  b.zoneout = p.update || p.zoneout != 0;
  b.keep_change = float(1 - p.zoneout);
  b.update = static_cast<const S*>(p.update);
  b.dout = static_cast<const S*>(data_of(kept.dout));
  b.dhn = static_cast<const S*>(data_of(kept.dhn));
  b.h0 = static_cast<const S*>(p.h0);
  b.out = static_cast<const S*>(p.out);
  b.gates = static_cast<const float*>(p.gates);
  b.dh0 = static_cast<S*>(dh0.mutable_data_ptr());
  b.dx = static_cast<S*>(deltas.dx.mutable_data_ptr());
  b.dq = static_cast<S*>(deltas.dq.mutable_data_ptr());
  b.previous = deltas.previous.size(0) ? static_cast<S*>(deltas.previous.mutable_data_ptr()) : nullptr;
  b.outer = layer_norm ? static_cast<float*>(deltas.outer.mutable_data_ptr()) : nullptr;
  b.normed = static_cast<const float*>(p.normed);
  b.rstd = static_cast<const float*>(p.rstd);
  const auto lay = [&](Arena arena) {
    walk.take(arena, layer_norm);
    b.carry = arena.take<float>(p.D * p.B * p.H);
    return arena.used;
  };
  const Tensor memory = call.make({lay(Arena{nullptr})}, ScalarType::Byte);
  lay(Arena{static_cast<char*>(memory.mutable_data_ptr())});
  walk.prepare(call);

  GruPackParams<S> pack{};
  walk.set(pack, call);
  pack.row_stride = 1;
  pack.k_stride = p.H;
  pack.K = 3 * p.H;
  for (int64_t d = 0; d < p.D; ++d) b.gain[d] = static_cast<const S*>(p.weights[d].g_hh);
  device.launch(gru_pack<S>, dim3(unsigned(ceil_div(pack.items(), 256))), 256, 0, pack);
  walk.launch(gru_backward<S>, gru_backward_step<S>, b, p.T + 1, layer_norm);
}

// The sum over rows of t (N, 3H), or of t times `factor`, into `to` (3H); made in float32.
void row_sums(Tensor to, const Tensor& t, const std::optional<Tensor>& factor = std::nullopt) {
  using torch::stable::detail::from;
  const int64_t rows = 0;
  Tensor sum = to.scalar_type() == ScalarType::Float ? to : new_like(to, {to.size(0)}, ScalarType::Float);
  Tensor values = t;
  if (factor) {
    values = new_like(t, {t.size(0), t.size(1)}, ScalarType::Float);
    std::array stack{from(t), from(*factor), from(values)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
  torch::stable::sum_out(sum, values, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1), false, ScalarType::Float);
  if (sum.get() != to.get()) torch::stable::copy_(to, sum);
}

// Gradients of the vectors of direction d, in their order: biases, then gains.
void vector_gradients(const GruCall& call, const GruKept& kept, const Deltas& deltas, int64_t d, const Tensor* to) {
  const GruParams& p = call.p;
  const int64_t H = p.H;
  const bool layer_norm = p.weights[0].g_hh;
  const Tensor dx = select(deltas.dx, 1, d);
  if (p.weights[d].b_ih) {
    row_sums(*to++, dx);
    if (layer_norm) {
      row_sums(*to++, select(deltas.outer, 0, d));
    } else {
      row_sums(part(*to, 0, 0, 2 * H), part(dx, 1, 0, 2 * H));
      row_sums(part(*to++, 0, 2 * H, H), select(deltas.dq, 0, d));
    }
  }
  if (!layer_norm) return;
  const Tensor normed = select(shaped(kept.normed, {p.D, p.N, 6 * H}), 0, d);
  row_sums(*to++, dx, part(normed, 1, 0, 3 * H));
  row_sums(*to, select(deltas.outer, 0, d), part(normed, 1, 3 * H, 3 * H));
}

// Of w_ih and w_hh; the gates r and z of h W have the gradient that those of x W have.
void matrix_gradients(const GruCall& call, const Deltas& deltas, int64_t d, const Tensor* to) {
  const GruParams& p = call.p;
  const int64_t H = p.H;
  const Tensor dx = transpose(select(deltas.dx, 1, d), 0, 1), dq = transpose(select(deltas.dq, 0, d), 0, 1);
  const Tensor previous = select(deltas.previous, 0, d);
  product(to[0], dx, shaped(call.input, {p.N, p.I}));
  if (dq.size(0) == 3 * H) return product(to[1], dq, previous);
  product(part(to[1], 0, 0, 2 * H), part(dx, 0, 0, 2 * H), previous);
  product(part(to[1], 0, 2 * H, H), dq, previous);
}

// Of both directions in one product, whose sums are not rounded in between.
void input_gradient(const GruCall& call, const Deltas& deltas, const Tensor& to) {
  const GruParams& p = call.p;
  Tensor w = call.weights[0];
  if (p.D == 2) {
    w = call.make({6 * p.H, p.I}, call.scalar);
    for (int64_t d = 0; d < 2; ++d) {
      Tensor half = part(w, 0, d * 3 * p.H, 3 * p.H);
      torch::stable::copy_(half, call.weights[size_t(d * call.per_direction)]);
    }
  }
  product(shaped(to, {p.N, p.I}), shaped(deltas.dx, {p.N, p.D * 3 * p.H}), w);
}

template <class S>
void backward(Device& device, const GruCall& call, const GruKept& kept, const GruGradientTensors& grads,
              bool input_wanted, bool weights_wanted) {
  const GruParams& p = call.p;
  const bool layer_norm = p.weights[0].g_hh;
  const Deltas deltas(call, layer_norm, weights_wanted);
  walk_back<S>(device, call, kept, grads.dh0, deltas);
  for (int64_t d = 0; d < p.D; ++d) {
    const Tensor* const to = weights_wanted ? &grads.dw[size_t(d * call.per_direction)] : nullptr;
    if (to) vector_gradients(call, kept, deltas, d, to + 2);
    if (layer_norm) {
      using Stored = stored_t<S>;
      GruNormParams<Stored> n = norm_params<Stored>(p, d);
      n.dy = static_cast<Stored*>(deltas.dx.mutable_data_ptr()) + d * 3 * p.H;
      n.dy_row = p.D * 3 * p.H;
      device.launch(gru_norm_backward<Stored>, dim3(unsigned(p.N)), 256, 16 * sizeof(float), n);
    }
    if (to) matrix_gradients(call, deltas, d, to);
  }
  if (input_wanted) input_gradient(call, deltas, grads.dx);
}

// ---- operators -----------------------------------------------------------------------------

// Calls f(device, S{}).
template <class F> void with_type(const GruCall& call, const F& f) {
  Device device(call.input, call.op);
  switch (call.scalar) {
    case ScalarType::Float: return device.uses_tf32() ? f(device, tf32{}) : f(device, float{});
    case ScalarType::BFloat16: return f(device, bf16{});
    case ScalarType::Half:
      if constexpr (kAllKernels) return f(device, f16{});
      [[fallthrough]];
    default: STD_TORCH_CHECK(false, "fastlm::", call.op, ": input must be float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_layer(
    const Tensor& input, const OptionalTensor& batch_sizes, const Tensor& hx, const std::vector<Tensor>& weights,
    bool has_biases, bool layer_norm, const OptionalTensor& update, double zoneout, bool save) {
  GruCall call("gru_layer", input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout);
  GruResults r(call, layer_norm, save);
  if (call.p.N == 0) torch::stable::copy_(r.hn, call.hx);
  else with_type(call, [&](Device& device, auto type) { forward<decltype(type)>(device, call, r.gates); });
  return {r.out, r.hn, r.gates, r.normed, r.rstd};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_layer_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_hn, const Tensor& input,
    const OptionalTensor& batch_sizes, const Tensor& hx, const std::vector<Tensor>& weights, bool has_biases,
    bool layer_norm, const OptionalTensor& update, double zoneout, const Tensor& output, const Tensor& gates,
    const Tensor& normed, const Tensor& rstd, bool input_wanted, bool weights_wanted) {
  GruCall call("gru_layer_backward", input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout);
  const GruKept kept(call, layer_norm, grad_output, grad_hn, output, gates, normed, rstd);
  GruGradientTensors grads(call, input_wanted, weights_wanted);
  if (call.p.N == 0) {
    if (kept.dhn) torch::stable::copy_(grads.dh0, *kept.dhn);
    else torch::stable::zero_(grads.dh0);
    for (Tensor& dw : grads.dw) torch::stable::zero_(dw);
  } else {
    with_type(call, [&](Device& device, auto type) {
      backward<decltype(type)>(device, call, kept, grads, input_wanted, weights_wanted);
    });
  }
  return {grads.dx, grads.dh0, grads.dw};
}

}  // namespace
}  // namespace fastlm::cuda::gru

FASTLM_OPERATORS(m) {
  m.impl("gru_layer", TORCH_BOX(&fastlm::cuda::gru::gru_layer));
  m.impl("gru_layer_backward", TORCH_BOX(&fastlm::cuda::gru::gru_layer_backward));
}
