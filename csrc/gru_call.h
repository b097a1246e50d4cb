// What the bindings of gru_layer and its backward share in all kernel families: arguments checked and made
// the parameters of cpu/gru.h, results allocated.
#pragma once
#include <vector>

#include "check.h"
#include "cpu/gru.h"

namespace fastlm {

inline const void* data_of(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional(fastlm::contiguous(*t)) : std::nullopt;
}

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
  std::optional<Tensor> update;
  std::vector<Tensor> weights;

  GruCall(const char* name, const Tensor& x, const std::optional<Tensor>& batch_sizes, const Tensor& h0,
          const std::vector<Tensor>& given, bool has_biases, bool layer_norm, const std::optional<Tensor>& mask,
          double zoneout)
      : op(name), dtype(dtype_of(x, name, "input")), scalar(x.scalar_type()), packed(batch_sizes.has_value()),
        per_direction(2 + 2 * has_biases + 2 * layer_norm), input(fastlm::contiguous(x)), hx(fastlm::contiguous(h0)),
        update(fastlm::contiguous(mask)) {
    for (const Tensor& w : given) weights.push_back(fastlm::contiguous(w));
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
    check_device(hx, input, op, "hx");
    read_weights(has_biases, layer_norm);
    if (update) {
      check_dtype(*update, scalar, op, "update");
      check_device(*update, input, op, "update");
      check_shape(*update, {p.N, p.D * p.H}, op, "update");
    }
    p.x = data_of(input);
    p.h0 = data_of(hx);
    p.update = data_of(update);
  }

  // An uninitialised tensor on the input's device.
  Tensor make(std::initializer_list<int64_t> size, ScalarType type) const {
    return new_tensor(size, type, &input);
  }
  // Of the shape of input, with another number of features.
  Tensor make_rows(int64_t features) const {
    return packed ? make({p.N, features}, scalar) : make({p.T, p.B, features}, scalar);
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
      to.w_ih = data_of(w[0]);
      to.w_hh = data_of(w[1]);
      int next = 2;
      const auto vector = [&](const char* name) {
        check_shape(w[next], {3 * p.H}, op, name);
        return data_of(w[next++]);
      };
      if (has_biases) {
        to.b_ih = vector("b_ih");
        to.b_hh = vector("b_hh");
      }
      if (layer_norm) {
        to.g_ih = vector("the input gain");
        to.g_hh = vector("the hidden gain");
      }
      for (int i = 0; i < per_direction; ++i) {
        check_dtype(w[i], scalar, op, "a weight");
        check_device(w[i], input, op, "a weight");
      }
    }
  }
};

// What a forward call gives; `gates` and what the norms need are empty unless `save`.
struct GruResults {
  Tensor out, hn, gates, normed, rstd;

  GruResults(GruCall& call, bool layer_norm, bool save)
      : out(call.make_rows(call.p.D * call.p.H)),
        hn(call.make({call.p.D, call.p.B, call.p.H}, call.scalar)),
        gates(call.make({save ? call.p.D : 0, call.p.N, 4 * call.p.H}, compute_type(call.scalar))),
        normed(call.make({save && layer_norm ? call.p.D : 0, call.p.N, 6 * call.p.H}, compute_type(call.scalar))),
        rstd(call.make({save && layer_norm ? call.p.D : 0, call.p.N, 2}, compute_type(call.scalar))) {
    GruParams& p = call.p;
    p.out = out.mutable_data_ptr();
    p.hn = hn.mutable_data_ptr();
    p.gates = save ? gates.mutable_data_ptr() : nullptr;
    p.normed = save && layer_norm ? normed.mutable_data_ptr() : nullptr;
    p.rstd = save && layer_norm ? rstd.mutable_data_ptr() : nullptr;
  }
};

// What a backward call takes beside the forward's arguments.
struct GruKept {
  std::optional<Tensor> dout, dhn;
  Tensor out, gates, normed, rstd;

  GruKept(GruCall& call, bool layer_norm, const std::optional<Tensor>& grad_output,
          const std::optional<Tensor>& grad_hn, const Tensor& output, const Tensor& kept, const Tensor& norms,
          const Tensor& scales)
      : dout(fastlm::contiguous(grad_output)), dhn(fastlm::contiguous(grad_hn)), out(fastlm::contiguous(output)),
        gates(fastlm::contiguous(kept)), normed(fastlm::contiguous(norms)), rstd(fastlm::contiguous(scales)) {
    GruParams& p = call.p;
    const auto same = [&](const Tensor& t, int64_t numel, ScalarType dtype, const char* name) {
      check_dtype(t, dtype, call.op, name);
      check_device(t, call.input, call.op, name);
      STD_TORCH_CHECK(t.numel() == numel, "fastlm::", call.op, ": ", name, " has the wrong size");
    };
    const int64_t rows = p.D * p.N;
    const ScalarType compute = compute_type(call.scalar);
    same(out, rows * p.H, call.scalar, "output");
    same(gates, rows * 4 * p.H, compute, "gates");
    if (dout) same(*dout, rows * p.H, call.scalar, "grad_output");
    if (dhn) same(*dhn, p.D * p.B * p.H, call.scalar, "grad_hn");
    if (layer_norm) {
      same(normed, rows * 6 * p.H, compute, "normed");
      same(rstd, rows * 2, compute, "rstd");
    }
    p.out = const_cast<void*>(data_of(out));
    p.gates = const_cast<void*>(data_of(gates));
    p.normed = const_cast<void*>(data_of(normed));
    p.rstd = const_cast<void*>(data_of(rstd));
  }
};

// What it gives; the gradients of weights in the order of the weights, none unless they are wanted.
struct GruGradientTensors {
  Tensor dx, dh0;
  std::vector<Tensor> dw;

  GruGradientTensors(const GruCall& call, bool input_wanted, bool weights_wanted)
      : dx(input_wanted ? call.make_rows(call.p.I) : call.make({0}, call.scalar)),
        dh0(call.make({call.p.D, call.p.B, call.p.H}, call.scalar)) {
    const int64_t rows = 3 * call.p.H;
    for (int64_t i = 0; weights_wanted && i < call.p.D * call.per_direction; ++i) {
      const int64_t place = i % call.per_direction;
      dw.push_back(place == 0   ? call.make({rows, call.p.I}, call.scalar)
                   : place == 1 ? call.make({rows, call.p.H}, call.scalar)
                                : call.make({rows}, call.scalar));
    }
  }
};

}  // namespace fastlm
