// Backward of gru.h: back through time, then one matrix product per weight over all rows.
//
// With dh the gradient of h', k and u as in gru.h and c = 1 - k:
//   dn = dh c (1 - n^2)     dq = dn r     dr = dn q r (1 - r)     dz = dh u (h - n) z (1 - z)
//   dh_prev = dh k + (dq, dr, dz) W_hh
// A row of `deltas` is (dq, dr, dz, dn), so that the gradient of h W and that of x W, (dr, dz, dn), are
// each one contiguous block. With layer norm the two differ throughout and stand side by side; what
// stands before the norms' own backward, whose differences largely cancel, is in the compute type.
#pragma once
#include "gru_recurrence.h"

namespace fastlm::FASTLM_ISA::gru {

// Scratch of a backward call.
template <class S> struct BackwardSpace {
  using F = compute_t<S>;
  using E = typename Factors<S>::E;
  using R = typename Factors<S>::R;
  Division division;
  int64_t vectors, K, ldh, ldg;  // of units; K: steps of a sum over 3H
  int64_t lddelta, input;       // input: offset of the gradient of x W in a row of deltas
  E* weights;        // [D][vectors K lanes] in panels, k in the order n, r, z
  F* carry;          // [D][B][ldh] gradient of the state, from the steps after
  R* step;           // [D][2][B][ldg] (dq, dr, dz) of a step
  S* deltas;         // [D][N][lddelta]
  F* normed_deltas;  // [D][N][4H] (dq, dr, dz, dn) before the norms' own backward, for layer norm
  S* previous;       // [D][N][H] h of the step before, or null where it can be read from the output
  F* gain;           // [D][2][3H + lanes]
  int64_t* lengths;  // [B]
  int64_t* bounds;   // [tiles + 1]
  Counter* counters;

  BackwardSpace(const GruParams& p, const GruGradients& g, Arena& arena) {
    const int64_t H = p.H;
    const bool norm = p.weights[0].g_hh;
    vectors = ceil_div<int64_t>(H, kLanes<F>);
    K = Factors<S>::steps(p, 3 * H);
    ldh = padded<F>(H);
    ldg = padded<F>(3 * H);
    input = norm ? 3 * H : H;
    lddelta = input + 3 * H;
    division = divide(p, vectors, vectors * K * kLanes<F> * int64_t(sizeof(E)));
    // Batches of one size in the compute type: the state before is the output, one step away.
    const bool shifted = sizeof(S) == sizeof(F) && p.N == p.T * p.B;
    weights = arena.take<E>(p.D * vectors * K * kLanes<F>);
    carry = arena.take<F>(p.D * p.B * ldh);
    step = arena.take<R>(p.D * 2 * p.B * ldg);
    deltas = arena.take<S>(p.D * p.N * lddelta);
    normed_deltas = arena.take<F>(norm ? p.D * p.N * 4 * H : 0);
    previous = arena.take<S>(shifted ? 0 : p.D * p.N * H);
    if (shifted || !g.weights_wanted) previous = nullptr;
    gain = arena.take<F>(norm ? p.D * 2 * (3 * H + kLanes<F>) : 0);
    lengths = arena.take<int64_t>(p.B);
    bounds = arena.take<int64_t>(division.tiles + 1);
    counters = arena.take<Counter>(p.D * division.tiles * division.parts * kCounters);
  }

  // The vector of units with which a part begins, or the parts end.
  int64_t begin(int64_t part) const { return vectors * part / division.parts; }
};

template <class S> int64_t backward_workspace(const GruParams& p, const GruGradients& g) {
  Arena arena{nullptr};
  BackwardSpace<S>(p, g, arena);
  return arena.used;
}

// Row k of the packed weights is row (k + 2H) mod 3H of w: gate order n, r, z.
template <class S, class E> void pack_units(const GruParams& p, const BackwardSpace<S>& space, const S* w, E* panels) {
  constexpr int64_t kPair = Pack<E>::kPair, kL = kLanes<E>;
  const int64_t H = p.H, K = ceil_div(3 * H, kPair);
  const auto row = [&](int64_t k) { return w + (k < H ? k + 2 * H : k - H) * H; };
  parallel(p.pool, K, 32, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      const int64_t k = step * kPair;
      for (int64_t part = 0; part < space.division.parts; ++part)
        each_panel(space.begin(part), space.begin(part + 1), [&](int64_t v, int64_t n) {
          E* const to = panels + (v * K + step * n) * kL;
          const int64_t units = least(n * kL, H - v * kL);
          Pack<E>::across(units, row(k) + v * kL, 1, k + 1 < 3 * H ? row(k + 1) + v * kL : nullptr, to);
          for (int64_t i = units; i < n * kL; ++i) to[i] = E(0);
        });
    }
  });
}

template <class S> struct Backward {
  using F = compute_t<S>;
  using E = typename Factors<S>::E;
  using R = typename Factors<S>::R;
  static constexpr int64_t kL = kLanes<F>;
  const GruParams& p;
  const GruGradients& g;
  const BackwardSpace<S>& space;

  bool norm() const { return p.weights[0].g_hh; }
  // The time step that the direction d comes to as its s-th, from the last that it took.
  int64_t time(int64_t d, int64_t s) const { return d ? s : p.T - 1 - s; }
  E* weights(int64_t d) const { return space.weights + d * space.vectors * space.K * kL; }
  F* carry(int64_t d) const { return space.carry + d * p.B * space.ldh; }
  R* step_deltas(int64_t d, int64_t s) const {
    return space.step + (d * 2 + (s & 1)) * p.B * space.ldg;
  }
  F* gain(int64_t d, int which) const { return space.gain + (d * 2 + which) * (3 * p.H + kL); }
  S* deltas(int64_t d) const { return space.deltas + d * p.N * space.lddelta; }
  F* normed_deltas(int64_t d) const { return space.normed_deltas + d * p.N * 4 * p.H; }
  const F* normed(int64_t d) const { return static_cast<const F*>(p.normed) + d * p.N * 6 * p.H; }
  const F* rstd(int64_t d) const { return static_cast<const F*>(p.rstd) + d * p.N * 2; }
  const S* previous_state(int64_t d, int64_t t, int64_t b) const;

  void prepare(int64_t d) const;
  void products(int64_t d, int64_t tile, int64_t part, int64_t s) const;
  void gates(int64_t d, int64_t tile, int64_t part, int64_t s) const;
  void hidden_norm(int64_t d, int64_t tile, int64_t part, int64_t s) const;
  void input_norm(int64_t d) const;
  template <class A> void bias_gradients(int64_t d, const A* y, int64_t ldy) const;
  void weight_gradients(int64_t d) const;
  void run() const;
};

// The state that sequence b had before time step t in direction d.
template <class S>
FASTLM_INLINE const S* Backward<S>::previous_state(int64_t d, int64_t t, int64_t b) const {
  const int64_t before = d ? t + 1 : t - 1;
  if (before >= 0 && before < p.T && b < active(p, before))
    return static_cast<const S*>(p.out) + (p.offsets[before] + b) * p.D * p.H + d * p.H;
  return static_cast<const S*>(p.h0) + (d * p.B + b) * p.H;
}

template <class S> void Backward<S>::prepare(int64_t d) const {
  const GruWeights& w = p.weights[d];
  const S* w_hh = static_cast<const S*>(w.w_hh);
  Factors<S>::pack(p, weights(d), [&](auto* to) { pack_units(p, space, w_hh, to); });
  // What may stand beside the last gradient in its pair.
  for (int64_t i = 0; i < 2 * p.B; ++i) step_deltas(d, 0)[i * space.ldg + 3 * p.H] = R{};
  for (int64_t b = 0; b < p.B; ++b)
    widen(p.H, g.dhn ? static_cast<const S*>(g.dhn) + (d * p.B + b) * p.H : nullptr,
          carry(d) + b * space.ldh);
  if (norm()) {
    widen(3 * p.H, static_cast<const S*>(w.g_ih), gain(d, 0));
    widen(3 * p.H, static_cast<const S*>(w.g_hh), gain(d, 1));
  }
}

// carry += (dq, dr, dz) W_hh for the sequences of step s.
template <class S>
void Backward<S>::products(int64_t d, int64_t tile, int64_t part, int64_t s) const {
  const int64_t b = space.bounds[tile], H = p.H;
  const int64_t rows = least(space.bounds[tile + 1], active(p, time(d, s))) - b;
  if (rows <= 0) return;
  const R* a = step_deltas(d, s) + b * space.ldg;
  const auto add = [&](int64_t v, int64_t n, const F* c) {
    const int64_t i0 = v * kL;
    for (int64_t m = 0; m < rows; ++m) {
      F* dh = carry(d) + (b + m) * space.ldh + i0;
      each_vector<F>(0, least(n * kL, H - i0), [&](int64_t i, int64_t w) {
        put<F>(dh + i, get<F>(dh + i, w) + load(c + m * kPanel<F> + i), w);
      });
    }
  };
  // What the gates of the step that comes next are made of lies in memory.
  const int64_t next = s + 1 < p.T ? p.offsets[time(d, s + 1)] + b : -1;
  const auto ahead = [&](int64_t v, int64_t n, int64_t m) {
    if (next < 0) return;
    const F* kept = static_cast<const F*>(p.gates) + (d * p.N + next + m) * 4 * H + v * kL;
    for (int64_t k = 0; k < 4; ++k) prefetch(n * kL, kept + k * H);
    if (g.dout) prefetch(n * kL, static_cast<const S*>(g.dout) + (next + m) * p.D * H + d * H + v * kL);
  };
  step_products<S>(p, rows, space.K, a, space.ldg, weights(d), space.begin(part), space.begin(part + 1), add, ahead);
}

// dh of step s is complete: the gradients of the gates, and what passes by them to the step before.
template <class S>
void Backward<S>::gates(int64_t d, int64_t tile, int64_t part, int64_t s) const {
  const int64_t t = time(d, s), b0 = space.bounds[tile], H = p.H;
  const int64_t end = least(space.bounds[tile + 1], active(p, t));
  const int64_t first = space.begin(part) * kL, last = least(H, space.begin(part + 1) * kL);
  const int64_t ldout = p.D * H;
  const bool zoneout = p.update || p.zoneout != 0;
  const Vec<F> one = splat(F(1));
  for (int64_t b = b0; b < end; ++b) {
    const int64_t row = p.offsets[t] + b;
    const F* kept = static_cast<const F*>(p.gates) + (d * p.N + row) * 4 * H;
    const S* before = previous_state(d, t, b);
    const S* dout = g.dout ? static_cast<const S*>(g.dout) + row * ldout + d * H : nullptr;
    const S* update = p.update ? static_cast<const S*>(p.update) + row * ldout + d * H : nullptr;
    S* previous = space.previous ? space.previous + (d * p.N + row) * H : nullptr;
    F* dh = carry(d) + b * space.ldh;
    R* hidden = step_deltas(d, s) + b * space.ldg;
    each_vector<F>(first, last, [&](int64_t i, int64_t w) FASTLM_INLINED {
      const Vec<F> r = get<F>(kept + i, w), z = get<F>(kept + H + i, w);
      const Vec<F> n = get<F>(kept + 2 * H + i, w), q = get<F>(kept + 3 * H + i, w);
      const Vec<F> h = get<F>(before + i, w);
      Vec<F> grad = get<F>(dh + i, w);
      if (dout) grad += get<F>(dout + i, w);
      Vec<F> keep = z, gain_z = grad;
      if (zoneout) {
        const Vec<F> u = update ? get<F>(update + i, w) : splat(F(1 - p.zoneout));
        keep = one - u * (one - z);
        gain_z = grad * u;
      }
      const Vec<F> dn = grad * (one - keep) * (one - n * n);
      const Vec<F> dz = gain_z * (h - n) * z * (one - z);
      const Vec<F> dr = dn * q * r * (one - r), dq = dn * r;
      put<F>(dh + i, grad * keep, w);
      const auto put_deltas = [&](auto* to) FASTLM_INLINED {
        put<F>(to + i, dq, w);
        put<F>(to + H + i, dr, w);
        put<F>(to + 2 * H + i, dz, w);
        put<F>(to + 3 * H + i, dn, w);
      };
      if (norm()) {
        put_deltas(normed_deltas(d) + row * 4 * H);
      } else {
        put<F>(hidden + i, dq, w);
        put<F>(hidden + H + i, dr, w);
        put<F>(hidden + 2 * H + i, dz, w);
        put_deltas(deltas(d) + row * space.lddelta);
      }
      if (previous) put<F>(previous + i, h, w);
    });
  }
}

// The backward of y = gain * v, v = (x - mean) * rstd over 3H values, as the two sums that dx needs:
//   dx = rstd (dv - mean(dv) - v mean(dv v)),   dv = dy gain
// at(i, w) gives the vectors dy, v and gain.
template <class F, class At>
FASTLM_INLINE void norm_means(int64_t n, const At& at, F& mean, F& slope) {
  Vec<F> sum{}, dot{};
  each_vector<F>(0, n, [&](int64_t i, int64_t w) {
    Vec<F> dy, v, gain;
    at(i, w, dy, v, gain);
    sum = fma(dy, gain, sum);
    dot = fma(dy * gain, v, dot);
  });
  mean = reduce_add(sum) / F(n);
  slope = reduce_add(dot) / F(n);
}

// (dq, dr, dz) of step s back through the norm of h W, for the units of a part.
template <class S>
void Backward<S>::hidden_norm(int64_t d, int64_t tile, int64_t part, int64_t s) const {
  const int64_t t = time(d, s), H = p.H;
  const int64_t end = least(space.bounds[tile + 1], active(p, t));
  const int64_t first = space.begin(part) * kL, last = least(H, space.begin(part + 1) * kL);
  for (int64_t b = space.bounds[tile]; b < end; ++b) {
    const int64_t row = p.offsets[t] + b;
    const F* dy = normed_deltas(d) + row * 4 * H;
    const F* v = normed(d) + row * 6 * H + 3 * H;
    F mean, slope;
    // Gates one by one: dy is in the order n, r, z, v and the gain in the order r, z, n.
    F means[3], slopes[3];
    for (int64_t k = 0; k < 3; ++k) {
      const int64_t gate = (k + 2) % 3 * H;
      norm_means<F>(H, [&](int64_t i, int64_t w, Vec<F>& a, Vec<F>& x, Vec<F>& gamma) {
        a = get<F>(dy + k * H + i, w);
        x = get<F>(v + gate + i, w);
        gamma = get<F>(gain(d, 1) + gate + i, w);
      }, means[k], slopes[k]);
    }
    mean = (means[0] + means[1] + means[2]) / F(3);
    slope = (slopes[0] + slopes[1] + slopes[2]) / F(3);
    const Vec<F> scale = splat(rstd(d)[row * 2 + 1]);
    for (int64_t k = 0; k < 3; ++k) {
      const int64_t gate = (k + 2) % 3 * H;
      each_vector<F>(first, last, [&](int64_t i, int64_t w) {
        const Vec<F> dv = get<F>(dy + k * H + i, w) * get<F>(gain(d, 1) + gate + i, w);
        const Vec<F> dx = scale * (dv - splat(mean) - get<F>(v + gate + i, w) * splat(slope));
        put<F>(step_deltas(d, s) + b * space.ldg + k * H + i, dx, w);
        put<F>(deltas(d) + row * space.lddelta + k * H + i, dx, w);
      });
    }
  }
}

// (dr, dz, dn) of all rows back through the norm of x W.
template <class S> void Backward<S>::input_norm(int64_t d) const {
  const int64_t H = p.H;
  parallel(p.pool, p.N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const F *dy = normed_deltas(d) + row * 4 * H + H, *v = normed(d) + row * 6 * H;
      S* dx = deltas(d) + row * space.lddelta + space.input;
      F mean, slope;
      norm_means<F>(3 * H, [&](int64_t i, int64_t w, Vec<F>& a, Vec<F>& x, Vec<F>& gamma) {
        a = get<F>(dy + i, w);
        x = get<F>(v + i, w);
        gamma = get<F>(gain(d, 0) + i, w);
      }, mean, slope);
      const Vec<F> scale = splat(rstd(d)[row * 2]);
      each_vector<F>(0, 3 * H, [&](int64_t i, int64_t w) {
        const Vec<F> dv = get<F>(dy + i, w) * get<F>(gain(d, 0) + i, w);
        put<F>(dx + i, scale * (dv - splat(mean) - get<F>(v + i, w) * splat(slope)), w);
      });
    }
  });
}

// The gradients of what is added to a row's products, or multiplied with them when normed: y is
// (dq, dr, dz, dn) of all rows.
template <class S> template <class A>
void Backward<S>::bias_gradients(int64_t d, const A* y, int64_t ldy) const {
  const int64_t H = p.H;
  const auto& w = g.d[d];
  const auto sums = [&](int64_t n, const A* a, const F* b, void* to, int64_t offset) {
    if (to) column_sums<S>(p.pool, p.N, n, a, ldy, b, 6 * H, static_cast<S*>(to) + offset);
  };
  sums(3 * H, y + H, nullptr, w.db_ih, 0);
  if (w.db_hh) __builtin_memcpy(w.db_hh, w.db_ih, size_t(2 * H) * sizeof(S));
  sums(H, y, nullptr, w.db_hh, 2 * H);
  if (!norm()) return;
  sums(3 * H, y + H, normed(d), w.dg_ih, 0);
  sums(2 * H, y + H, normed(d) + 3 * H, w.dg_hh, 0);
  sums(H, y, normed(d) + 5 * H, w.dg_hh, 2 * H);
}

template <class S> void Backward<S>::weight_gradients(int64_t d) const {
  const int64_t H = p.H, ld = space.lddelta, N = p.N;
  const auto& w = g.d[d];
  const S *hidden = deltas(d), *input = hidden + space.input;
  if (norm()) bias_gradients(d, normed_deltas(d), 4 * H);
  else bias_gradients(d, hidden, ld);
  gemm(p.pool, Gemm<S, S, S>{3 * H, p.I, N, input, 1, ld, static_cast<const S*>(p.x), p.I, 1,
                             static_cast<S*>(w.dw_ih), p.I});
  const auto add = [&](int64_t row, int64_t K, const S* h, int64_t ldh, bool accumulate) {
    Gemm<S, S, S> dw{3 * H, H, K, hidden + row * ld, 1, ld, h, ldh, 1, static_cast<S*>(w.dw_hh), H};
    dw.accumulate = accumulate;
    dw.shift = 2 * H;  // gates from the order n, r, z to r, z, n
    gemm(p.pool, dw);
  };
  const S* h0 = static_cast<const S*>(p.h0) + d * p.B * H;
  const S* out = static_cast<const S*>(p.out) + d * H;
  if (space.previous) {
    add(0, N, space.previous + d * N * H, H, false);
  } else {
    const int64_t rest = N - p.B;
    add(d ? rest : 0, p.B, h0, H, false);
    add(d ? 0 : p.B, rest, d ? out + p.B * p.D * H : out, p.D * H, true);
  }
}

template <class S> void Backward<S>::run() const {
  sequence_lengths(p, space.lengths);
  cut_tiles(p, space.division.tiles, space.bounds);
  for (int64_t d = 0; d < p.D; ++d) prepare(d);
  const int64_t tiles = space.division.tiles;
  // A phase ends the step after, and begins this one; with layer norm the norm is a phase of its own.
  const int64_t stages = norm() ? 2 : 1;
  lockstep(p.pool, p.D * tiles, space.division.parts, stages * p.T + 1, space.counters,
           [&](int64_t group, int64_t part, int64_t phase) {
             const int64_t d = group / tiles, tile = group % tiles, s = phase / stages;
             if (phase % stages) return hidden_norm(d, tile, part, s);
             if (s > 0) products(d, tile, part, s - 1);
             if (s < p.T) gates(d, tile, part, s);
           });
  for (int64_t d = 0; d < p.D; ++d)
    for (int64_t b = 0; b < p.B; ++b) {
      S* dh0 = static_cast<S*>(g.dh0) + (d * p.B + b) * p.H;
      const F* dh = carry(d) + b * space.ldh;
      each_vector<F>(0, p.H, [&](int64_t i, int64_t w) { put<F>(dh0 + i, get<F>(dh + i, w), w); });
    }
  for (int64_t d = 0; d < p.D; ++d) {
    if (norm()) input_norm(d);
    if (g.weights_wanted) weight_gradients(d);
  }
  if (!g.dx) return;
  for (int64_t d = 0; d < p.D; ++d) {
    Gemm<S, S, S> dx{p.N, p.I, 3 * p.H, deltas(d) + space.input, space.lddelta, 1,
                     static_cast<const S*>(p.weights[d].w_ih), p.I, 1, static_cast<S*>(g.dx), p.I};
    dx.accumulate = d > 0;
    gemm(p.pool, dx);
  }
}

template <class S> void backward(const GruParams& p, const GruGradients& g) {
  Arena arena{static_cast<char*>(p.workspace)};
  const BackwardSpace<S> space(p, g, arena);
  Backward<S>{p, g, space}.run();
}

}  // namespace fastlm::FASTLM_ISA::gru
