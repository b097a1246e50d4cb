// The loss of one token and its derivative, shared by cross-entropy over logits and by the linear form,
// and sums over all tokens. With logits x (capped already), class weights w, smoothing e, z-loss z:
//
//   lse = log sum_c exp(x_c)
//   loss = (1 - e) w_y (lse - x_y) + e/C sum_c w_c (lse - x_c) + z lse^2         class index y
//   loss = sum_c w_c q'_c (lse - x_c) + z lse^2,  q' = (1 - e) q + e/C           probabilities q
//   dx_c = a softmax_c - b [c = y] - s w_c - g w_c q'_c
//
// with a token's a, b, s, g in struct Coefficients. T is the compute type: double for double, else float.
// No float64 is computed with per token of other types: consumer GPUs have 1/64 of the throughput there.
#pragma once
#include "../cpu/token_loss.h"
#include "device.cuh"

namespace fastlm::cuda {

using TokenLoss = TokenLossOf<const void*>;

FASTLM_DEVICE float exp_of(float x) { return exp2_fast(x * kLog2e); }
FASTLM_DEVICE double exp_of(double x) { return exp(x); }
FASTLM_DEVICE float log_of(float x) { return logf(x); }
FASTLM_DEVICE double log_of(double x) { return log(x); }

template <class T> FASTLM_DEVICE T capped(T x, T cap) { return cap * tanh_of(x * (1 / cap)); }
template <class T> FASTLM_DEVICE T capped_slope(T capped_x, T cap) {
  const T t = capped_x * (1 / cap);
  return 1 - t * t;
}

// exp(-inf - -inf) must not become NaN while only -inf has been seen. A NaN is no maximum either: it
// comes through the sum.
template <class T> FASTLM_DEVICE T finite_max(T m) { return m > T(-kInfinity) ? m : T(0); }

// Sums over the classes seen so far, beside their maximum (Milakov and Gimelshein, arXiv:1805.02867), so
// that a large common offset of the logits cancels exactly.
template <class T> struct alignas(16) Running {
  T m = T(-kInfinity);
  T total = 0;  // of exp(x_c - m)
  T mass = 0;   // of w_c (smoothing) or w_c q'_c (probabilities)
  T dot = 0;    // of the same times (x_c - m)

  FASTLM_DEVICE void rise_to(T top) {
    const T before = finite_max(m), after = finite_max(top);
    total *= exp_of(m - after);
    dot += mass * (before - after);
    m = top;
  }

  // shares: w_c or w_c q'_c, or null where no sum needs them
  template <int W> FASTLM_DEVICE void add(const T (&x)[W], const T* shares) {
    T top = m;
#pragma unroll
    for (int j = 0; j < W; ++j) top = max(top, x[j]);
    rise_to(top);
    const T r = finite_max(top);
#pragma unroll
    for (int j = 0; j < W; ++j) total += exp_of(x[j] - r);
    if (!shares) return;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      mass += shares[j];
      dot += shares[j] * (x[j] - r);
    }
  }

  FASTLM_DEVICE void join(Running other) {
    const T top = max(m, other.m);
    rise_to(top);
    other.rise_to(top);
    total += other.total;
    mass += other.mass;
    dot += other.dot;
  }

  // Over the lanes of a warp; all have the same bits then, as sums of two commute.
  FASTLM_DEVICE void join_lanes() {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      join({__shfl_xor_sync(kAllLanes, m, step), __shfl_xor_sync(kAllLanes, total, step),
            __shfl_xor_sync(kAllLanes, mass, step), __shfl_xor_sync(kAllLanes, dot, step)});
  }
};

// lse and what rounding took from it: a confident token's loss, lse - x_y, and its gradient cancel to far
// below an ulp of lse, and must not inherit that error.
template <class T> struct LogSum {
  T lse, low;

  FASTLM_DEVICE static LogSum of(const Running<T>& r) {
    const T m = finite_max(r.m), log_sum = log_of(r.total);
    const T sum = m + log_sum, part = sum - m;
    const T low = (m - (sum - part)) + (log_sum - part);
    return {sum, low == low ? low : T(0)};  // 0 of an infinite lse
  }
};

// x_y, w_y: logit and weight of the token's class, if it has one.
template <class T>
FASTLM_DEVICE T token_loss(const TokenLoss& p, int64_t C, LogSum<T> s, const Running<T>& r, T x_y, T w_y) {
  const T e = T(p.label_smoothing), z = T(p.z_loss);
  const T rest = r.mass * ((s.lse - finite_max(r.m)) + s.low) - r.dot;
  T loss = rest;
  if (p.target) {
    loss = (1 - e) * w_y * ((s.lse - x_y) + s.low);
    if (e > 0) loss += e / T(C) * rest;
  }
  return z != 0 ? loss + z * s.lse * s.lse : loss;
}

template <class T> struct Coefficients {
  T softmax, onehot, smooth, probs;
  FASTLM_DEVICE bool none() const { return softmax == 0 && onehot == 0 && smooth == 0 && probs == 0; }
};

// i: the token's place in [N][S]; kept: it counts. mass: sum_c w_c q'_c for probabilities.
template <class T>
FASTLM_DEVICE Coefficients<T> coefficients(const TokenLoss& p, int64_t C, int64_t i, bool kept, T w_y, T lse,
                                           T mass) {
  Coefficients<T> k{p.dlse ? static_cast<const T*>(p.dlse)[i] : T(0), 0, 0, 0};
  if (!kept) return k;
  const T e = T(p.label_smoothing), z = T(p.z_loss);
  T g = p.scale ? *static_cast<const T*>(p.scale) : T(1);
  if (p.dloss) g *= static_cast<const T*>(p.dloss)[i];
  if (p.target) {
    k.onehot = g * (1 - e) * w_y;
    k.softmax += k.onehot;
    if (e > 0) {
      k.smooth = g * e / T(C);
      k.softmax += k.smooth * (p.weight ? *static_cast<const T*>(p.weight_sum) : T(C));
    }
  } else {
    k.probs = g;
    k.softmax += g * mass;
  }
  if (z != 0) k.softmax += 2 * z * g * lse;
  return k;
}

// ---- sums over tokens or classes -----------------------------------------------------------

enum SumOf : int { kTargets, kValues, kPartials };

// total = start + a sum over `count` elements, in float64 and in an order that the count fixes:
//   kTargets   weights (null: 1) of the classes of tokens that count
//   kValues    values
//   kPartials  the results of an earlier launch's blocks
// Several blocks leave theirs in `partials`; one block stores what is asked for. T: the compute type.
struct SumParams {
  SumOf of;
  int64_t count;
  const void* values;         // [count] of T
  const int64_t* target;      // [count]
  const void* weight;         // [C] of T, or null
  int64_t C, ignore_index;
  double start;
  double* partials;           // [blocks][2]: sum, targets out of bounds

  double* total;              // each of these may be null
  double* inside;             // 1 where no target is out of bounds, else 0
  void* scale;                // T: dloss / total
  const void* dloss;          // of dloss_type, null: 1
  DType dloss_type;
  bool finite_scale;          // 0 instead of infinity and NaN
  void* result;               // of result_type: total / denominator
  DType result_type;
  const double* denominator;  // null: 1
};

inline constexpr int kSumThreads = 512;

FASTLM_DEVICE double read_as(const void* p, DType type, int64_t i) {
  switch (type) {
    case kF64: return static_cast<const double*>(p)[i];
    case kF32: return static_cast<const float*>(p)[i];
    case kBF16: return widen(static_cast<const bf16*>(p)[i]);
    default: return widen(static_cast<const f16*>(p)[i]);
  }
}

FASTLM_DEVICE void write_as(void* p, DType type, double x) {
  switch (type) {
    case kF64: *static_cast<double*>(p) = x; return;
    case kF32: *static_cast<float*>(p) = float(x); return;
    case kBF16: *static_cast<bf16*>(p) = narrow<bf16>(float(x)); return;
    default: *static_cast<f16*>(p) = narrow<f16>(float(x));
  }
}

template <class T> FASTLM_DEVICE void finish_sum(const SumParams& p, double total, double outside) {
  if (p.total) *p.total = total;
  if (p.inside) *p.inside = outside == 0;
  if (p.scale) {
    const double scale = (p.dloss ? read_as(p.dloss, p.dloss_type, 0) : 1) / total;
    *static_cast<T*>(p.scale) = T(p.finite_scale && !(scale - scale == 0) ? 0 : scale);
  }
  if (p.result) write_as(p.result, p.result_type, p.denominator ? total / *p.denominator : total);
}

template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_tokens(const __grid_constant__ SumParams p) {
  double total = 0, outside = 0;
  for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < p.count;
       i += int64_t(gridDim.x) * kSumThreads) {
    if (p.of == kTargets) {
      const int64_t y = p.target[i];
      if (y == p.ignore_index) continue;
      if (y < 0 || y >= p.C) outside += 1;
      else total += p.weight ? static_cast<const T*>(p.weight)[y] : T(1);
    } else if (p.of == kValues) {
      total += static_cast<const T*>(p.values)[i];
    } else {
      total += p.partials[2 * i];
      outside += p.partials[2 * i + 1];
    }
  }
  double* const scratch = reinterpret_cast<double*>(shared_memory());  // [2][warps]
  constexpr int kWarps = kSumThreads / 32;
  const auto add = [](double a, double b) { return a + b; };
  total = block_reduce<kWarps>(total, scratch, add);
  outside = block_reduce<kWarps>(outside, scratch + kWarps, add);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    finish_sum<T>(p, p.start + total, outside);
  } else {
    p.partials[2 * blockIdx.x] = total;
    p.partials[2 * blockIdx.x + 1] = outside;
  }
}

}  // namespace fastlm::cuda
