// The loss of one token and its derivative, shared by cross-entropy over logits and by the linear
// form; the formulas stand in cross_entropy.h. Also vectors with a partial last one.
#pragma once
#include "kernels.h"

namespace fastlm {

struct Strides { int64_t n, c, s; };  // in elements, of [N][C][S]

// What a token's loss and gradient depend on; T below is the compute type of the kernel. Scalar: a double,
// or on a GPU, which computes it, a pointer to one T.
template <class Scalar> struct TokenLossOf {
  const int64_t* target;   // [N][S] class indices, or null: probabilities
  const void* probs;       // [N][C][S] of the storage type, or null
  Strides probs_at;
  const void* weight;      // [C] of T, or null
  Scalar weight_sum;       // sum of weight, C without; on a GPU only where smoothing needs it
  double label_smoothing, z_loss, softcap;
  int64_t ignore_index;
  void* loss;              // [N][S] of T, out; null in the backward
  void* lse;               // [N][S] of T, out in the forward, in in the backward
  void* low;               // [N][S] of T, as lse: what rounding to T took from lse
  bool lse_everywhere;     // ignored tokens too
  const void* dloss;       // [N][S] of T, or null: 1
  const void* dlse;        // [N][S] of T, or null: 0
  Scalar scale;            // of dloss: 1 / denominator for a mean, times the scalar upstream; null: 1
};

using TokenLoss = TokenLossOf<double>;

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "simd.h"

namespace fastlm::FASTLM_ISA {

// A vector's worth of lanes: all of them, or the first n.
struct Whole {};
struct Part { int64_t n; };
template <class T, class S> FASTLM_INLINE Vec<T> load(const S* p, Whole) { return load<T>(p); }
template <class T, class S> FASTLM_INLINE Vec<T> load(const S* p, Part w) { return load<T>(p, w.n); }
template <class S, class V> FASTLM_INLINE void store(S* p, V v, Whole) { store(p, v); }
template <class S, class V> FASTLM_INLINE void store(S* p, V v, Part w) { store(p, v, w.n); }
template <class V> FASTLM_INLINE V fill_rest(V v, Whole, element_t<V>) { return v; }
template <class V> FASTLM_INLINE V fill_rest(V v, Part w, element_t<V> rest) {
  return select(first_lanes<element_t<V>>(w.n), v, splat(rest));
}
template <class T, class F> FASTLM_INLINE void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

inline constexpr double kInfinity = __builtin_inf();

// exp(x) for x up to 88, of logits of the storage type S.
template <class S, class V> FASTLM_INLINE V exp_below(V x) { return exp_negative<sizeof(S) == 2>(x); }

// exp(-inf - -inf) must not become NaN while only -inf has been seen. A NaN is not kept as a
// maximum either: it comes through the sum.
template <class T> FASTLM_INLINE T finite_max(T m) { return m > T(-kInfinity) ? m : T(0); }

template <class V> FASTLM_INLINE V capped(V x, element_t<V> cap) {
  return splat(cap) * tanh(x * splat(1 / cap));
}
template <class V> FASTLM_INLINE V capped_slope(V capped_x, element_t<V> cap) {
  const V t = capped_x * splat(1 / cap);
  return splat(element_t<V>(1)) - t * t;
}

template <class T> struct Coefficients {
  T softmax, onehot, smooth, probs;
  int64_t y;  // -1 without a class index
};

// i: the token's place in [N][S]. mass: sum_c w_c q'_c for probabilities.
template <class T>
FASTLM_INLINE Coefficients<T> coefficients(const TokenLoss& p, int64_t C, int64_t i, T lse, T mass) {
  const T e = T(p.label_smoothing);
  const T h = p.dlse ? static_cast<const T*>(p.dlse)[i] : T(0);
  T g = T(p.scale) * (p.dloss ? static_cast<const T*>(p.dloss)[i] : T(1));
  Coefficients<T> k{h, 0, 0, 0, -1};
  if (p.target) {
    if (p.target[i] == p.ignore_index) return k;
    k.y = p.target[i];
    k.onehot = g * (1 - e) * (p.weight ? static_cast<const T*>(p.weight)[k.y] : T(1));
    k.smooth = e > 0 ? g * e / T(C) : T(0);
    k.softmax += k.onehot + (e > 0 ? k.smooth * T(p.weight_sum) : T(0));
  } else {
    k.probs = g;
    k.softmax += g * mass;
  }
  if (p.z_loss != 0) k.softmax += 2 * T(p.z_loss) * g * lse;
  return k;
}

// Sums that a token's loss needs beside its log-sum-exp, relative to a value r near the maximum so
// that a large common offset of the logits cancels exactly.
template <class T> struct Sums {
  T r;          // reference
  double mass;  // sum_c w_c (smoothing) or w_c q'_c (probabilities)
  double dot;   // sum_c of the same times (x_c - r)
};

// lse = m + log_sum, and what is left of it: a confident token's loss, lse - x_y, and its gradient
// cancel to far below an ulp of lse, and must not inherit that error.
template <class T> FASTLM_INLINE void store_lse(const TokenLoss& p, int64_t i, double m, double log_sum) {
  const double sum = m + log_sum, part = sum - m;
  const double error = (m - (sum - part)) + (log_sum - part);
  const T lse = T(sum);
  const T low = T((sum - double(lse)) + error);
  static_cast<T*>(p.lse)[i] = lse;
  static_cast<T*>(p.low)[i] = low == low ? low : T(0);  // of an infinite lse
}

// Of the token at i, whose lse is stored. x_y: the logit of its class, if it has one.
template <class T>
FASTLM_INLINE T token_loss(const TokenLoss& p, int64_t C, int64_t i, T x_y, const Sums<T>& s) {
  const double e = p.label_smoothing;
  const double lse = double(static_cast<const T*>(p.lse)[i]), low = double(static_cast<const T*>(p.low)[i]);
  const double rest = p.target && e == 0 ? 0 : s.mass * ((lse - double(s.r)) + low) - s.dot;
  double loss = rest;
  if (p.target) {
    const double w = p.weight ? double(static_cast<const T*>(p.weight)[p.target[i]]) : 1;
    loss = (1 - e) * w * ((lse - double(x_y)) + low);
    if (e > 0) loss += e / double(C) * rest;
  }
  if (p.z_loss != 0) loss += p.z_loss * lse * lse;
  return T(loss);
}

}  // namespace fastlm::FASTLM_ISA
#endif
