// fastlm::gru_layer and its backward: tensors to the parameters of gru.h.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../check.h"
#include "dispatch.h"

namespace fastlm {
namespace {

using Optional = std::optional<Tensor>;

const void* data(const Tensor& t) { return t.const_data_ptr(); }
const void* data(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

Optional contiguous_if(const Optional& t) { return t ? Optional(fastlm::contiguous(*t)) : Optional(); }

// The arguments that forward and backward share, checked, with the memory that the parameters point to.
struct GruCall {
  const char* op;
  GruParams p{};
  DType dtype;
  ScalarType scalar;
  bool packed;
  int per_direction;
  std::vector<int64_t> offsets;
  Tensor input, hx;
  Optional update;
  std::vector<Tensor> weights;

  GruCall(const char* name, const Tensor& x, const Optional& batch_sizes, const Tensor& h0,
          const std::vector<Tensor>& given, bool has_biases, bool layer_norm, const Optional& mask,
          double zoneout)
      : op(name), dtype(dtype_of(x, name, "input")), scalar(x.scalar_type()), packed(batch_sizes.has_value()),
        per_direction(2 + 2 * has_biases + 2 * layer_norm), input(fastlm::contiguous(x)), hx(fastlm::contiguous(h0)),
        update(contiguous_if(mask)) {
    for (const Tensor& w : given) weights.push_back(fastlm::contiguous(w));
    p.pool = torch_pool();
    p.zoneout = zoneout;
    check(op, input.dim() == (packed ? 2 : 3), "input must have ", packed ? "2" : "3", " dimensions");
    check(op, hx.dim() == 3, "hx must have 3 dimensions");
    p.D = hx.size(0);
    p.B = hx.size(1);
    p.H = hx.size(2);
    p.I = input.size(packed ? 1 : 2);
    check(op, p.D == 1 || p.D == 2, "hx must have 1 or 2 directions");
    check(op, p.H > 0, "the hidden size must be positive");
    if (packed) {
      read_batch_sizes(*batch_sizes);
    } else {
      p.T = input.size(0);
      offsets.resize(size_t(p.T) + 1);
      for (int64_t t = 0; t <= p.T; ++t) offsets[size_t(t)] = t * p.B;
      check(op, input.size(1) == p.B, "input and hx differ in batch size");
    }
    p.offsets = offsets.data();
    p.N = offsets.back();
    check_dtype(hx, scalar, op, "hx");
    read_weights(has_biases, layer_norm);
    if (update) {
      check_dtype(*update, scalar, op, "update");
      check_shape(*update, {p.N, p.D * p.H}, op, "update");
    }
    p.x = data(input);
    p.h0 = data(hx);
    p.update = data(update);
  }

  template <class... Parts> static void check(const char* op, bool ok, const Parts&... parts) {
    STD_TORCH_CHECK(ok, "fastlm::", op, ": ", parts...);
  }

  void read_batch_sizes(const Tensor& given) {
    check(op, given.scalar_type() == ScalarType::Long && given.dim() == 1 && given.is_cpu(),
          "batch_sizes must be an int64 vector on the CPU");
    const Tensor sizes = fastlm::contiguous(given);
    p.T = sizes.size(0);
    const int64_t* n = sizes.const_data_ptr<int64_t>();
    offsets.assign(1, 0);
    for (int64_t t = 0; t < p.T; ++t) {
      check(op, n[t] > 0 && n[t] <= (t ? n[t - 1] : p.B), "batch_sizes must be positive and not grow");
      offsets.push_back(offsets.back() + n[t]);
    }
    check(op, p.T == 0 || n[0] == p.B, "batch_sizes and hx differ in batch size");
    check(op, offsets.back() == input.size(0), "batch_sizes must add up to the rows of input");
  }

  void read_weights(bool has_biases, bool layer_norm) {
    check(op, int64_t(weights.size()) == p.D * per_direction, "wrong number of weights");
    for (int64_t d = 0; d < p.D; ++d) {
      const Tensor* w = &weights[size_t(d * per_direction)];
      GruWeights& to = p.weights[d];
      check_shape(w[0], {3 * p.H, p.I}, op, "w_ih");
      check_shape(w[1], {3 * p.H, p.H}, op, "w_hh");
      to.w_ih = data(w[0]);
      to.w_hh = data(w[1]);
      int next = 2;
      const auto vector = [&](const char* name) {
        check_shape(w[next], {3 * p.H}, op, name);
        return data(w[next++]);
      };
      if (has_biases) {
        to.b_ih = vector("b_ih");
        to.b_hh = vector("b_hh");
      }
      if (layer_norm) {
        to.g_ih = vector("the input gain");
        to.g_hh = vector("the hidden gain");
      }
      for (int i = 0; i < per_direction; ++i) check_dtype(w[i], scalar, op, "a weight");
    }
  }
};

Tensor bytes(int64_t n) { return new_tensor({n}, ScalarType::Byte); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_layer(
    const Tensor& input, const Optional& batch_sizes, const Tensor& hx,
    const std::vector<Tensor>& weights, bool has_biases, bool layer_norm, const Optional& update,
    double zoneout, bool save) {
  GruCall call("gru_layer", input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout);
  GruParams& p = call.p;
  const ScalarType s = call.scalar;
  Tensor out = call.packed ? new_tensor({p.N, p.D * p.H}, s) : new_tensor({p.T, p.B, p.D * p.H}, s);
  Tensor hn = new_tensor({p.D, p.B, p.H}, s);
  const bool norms = save && layer_norm;
  Tensor gates = new_tensor({save ? p.D : 0, p.N, 4 * p.H}, compute_type(s));
  Tensor normed = new_tensor({norms ? p.D : 0, p.N, 6 * p.H}, compute_type(s));
  Tensor rstd = new_tensor({norms ? p.D : 0, p.N, 2}, compute_type(s));
  p.out = out.mutable_data_ptr();
  p.hn = hn.mutable_data_ptr();
  p.gates = save ? gates.mutable_data_ptr() : nullptr;
  p.normed = norms ? normed.mutable_data_ptr() : nullptr;
  p.rstd = norms ? rstd.mutable_data_ptr() : nullptr;
  const GruKernels& k = kernels().gru;
  Tensor workspace = bytes(k.forward_workspace[call.dtype](p));
  p.workspace = workspace.mutable_data_ptr();
  k.forward[call.dtype](p);
  return {out, hn, gates, normed, rstd};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_layer_backward(
    const Optional& grad_output, const Optional& grad_hn, const Tensor& input,
    const Optional& batch_sizes, const Tensor& hx, const std::vector<Tensor>& weights, bool has_biases,
    bool layer_norm, const Optional& update, double zoneout, const Tensor& output, const Tensor& gates,
    const Tensor& normed, const Tensor& rstd, bool input_wanted, bool weights_wanted) {
  const char* op = "gru_layer_backward";
  GruCall call(op, input, batch_sizes, hx, weights, has_biases, layer_norm, update, zoneout);
  GruParams& p = call.p;
  const ScalarType s = call.scalar;
  const Optional dout = contiguous_if(grad_output), dhn = contiguous_if(grad_hn);
  const Tensor out = fastlm::contiguous(output), kept = fastlm::contiguous(gates);
  const Tensor norms = fastlm::contiguous(normed), scales = fastlm::contiguous(rstd);
  const auto same = [&](const Tensor& t, int64_t numel, ScalarType dtype, const char* name) {
    check_dtype(t, dtype, op, name);
    STD_TORCH_CHECK(t.numel() == numel, "fastlm::", op, ": ", name, " has the wrong size");
  };
  const int64_t rows = p.D * p.N;
  same(out, rows * p.H, s, "output");
  same(kept, rows * 4 * p.H, compute_type(s), "gates");
  if (dout) same(*dout, rows * p.H, s, "grad_output");
  if (dhn) same(*dhn, p.D * p.B * p.H, s, "grad_hn");
  if (layer_norm) {
    same(norms, rows * 6 * p.H, compute_type(s), "normed");
    same(scales, rows * 2, compute_type(s), "rstd");
  }
  p.out = const_cast<void*>(data(out));
  p.gates = const_cast<void*>(data(kept));
  p.normed = const_cast<void*>(data(norms));
  p.rstd = const_cast<void*>(data(scales));

  Tensor dx = !input_wanted ? new_tensor({0}, s)
              : call.packed ? new_tensor({p.N, p.I}, s)
                            : new_tensor({p.T, p.B, p.I}, s);
  Tensor dh0 = new_tensor({p.D, p.B, p.H}, s);
  std::vector<Tensor> dw;
  GruGradients g{data(dout), data(dhn), input_wanted ? dx.mutable_data_ptr() : nullptr,
                 dh0.mutable_data_ptr(), weights_wanted, {}};
  for (int64_t d = 0; weights_wanted && d < p.D; ++d) {
    auto& to = g.d[d];
    const auto grad = [&](std::initializer_list<int64_t> shape) {
      dw.push_back(new_tensor(shape, s));
      return dw.back().mutable_data_ptr();
    };
    to.dw_ih = grad({3 * p.H, p.I});
    to.dw_hh = grad({3 * p.H, p.H});
    if (has_biases) {
      to.db_ih = grad({3 * p.H});
      to.db_hh = grad({3 * p.H});
    }
    if (layer_norm) {
      to.dg_ih = grad({3 * p.H});
      to.dg_hh = grad({3 * p.H});
    }
  }
  const GruKernels& k = kernels().gru;
  Tensor workspace = bytes(k.backward_workspace[call.dtype](p, g));
  p.workspace = workspace.mutable_data_ptr();
  k.backward[call.dtype](p, g);
  return {dx, dh0, dw};
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("gru_layer", TORCH_BOX(&fastlm::gru_layer));
  m.impl("gru_layer_backward", TORCH_BOX(&fastlm::gru_layer_backward));
}
