// Attention's forward with the keys of one row divided among blocks: how they are divided, and the kernel
// that joins the results.
//
//   m = max m_n,  l = sum_n exp2(m_n - m) l_n,  O = sum_n (exp2(m_n - m) l_n / l) O_n
//
// where a split n leaves its own O_n and lse_n = m_n + log2 l_n, both in float32.
#pragma once
#include "attention.cuh"

namespace fastlm::cuda {

struct ForwardParams {
  AttentionParams a;
  int64_t rows_most;         // rows of a key head, at most
  int blocks;                // of rows
  int together;              // heads_together
  int row_warps, key_warps;
  int stages;                // 1 to 3
  int splits;                // of the keys of any sequence, at most; 1: none, and results are final
  int most_splits;           // of a sequence of any length
  float *part_out, *part_lse;  // [B][Hkv][splits][rows_most][Dv] and [...], in base 2
};

inline constexpr int kSplitKeys = 256;  // at least

// How the keys of a sequence are divided: as its own length has it, whatever the others'. Splits are whole
// pieces of every kernel.
struct KeySplits { int count, keys; };
FASTLM_DEVICE KeySplits splits_of(const ForwardParams& p, int Tk) {
  if (p.splits == 1) return {1, Tk};
  int keys = ((Tk + p.most_splits - 1) / p.most_splits + 127) / 128 * 128;
  if (keys < kSplitKeys) keys = kSplitKeys;
  const int count = (Tk + keys - 1) / keys;
  return {count > 0 ? count : 1, keys};
}

// What turns sums under the maximum m (base 2) into probabilities, and the row's lse (base 2). A sink's
// logit joins the sum.
struct Normaliser { float scale, lse; };
FASTLM_DEVICE Normaliser normalise(float m, float l, const float* sink) {
  if (sink) {
    const float logit = *sink * kLog2e, top = fmaxf(m, logit);
    if (m == -kInfinity && logit == -kInfinity) return {0, -kInfinity};  // not where either is NaN
    const float ratio = exp2_fast(m - top);
    l = l * ratio + exp2_fast(logit - top);
    return {ratio / l, top + log2f(l)};
  }
  if (l == 0) return {0, -kInfinity};
  return {1 / l, m + log2f(l)};
}

inline constexpr int kCombineWarps = 4;

// Joins the splits of one row: the mean of their results, weighted with their shares of the sum. Warp w has
// the splits w, w + 4, ..., a lane four columns, and of heads beyond 128 the same 128 behind.
template <class T>
__global__ void __launch_bounds__(32 * kCombineWarps) attention_combine(const __grid_constant__ ForwardParams p) {
  using Four = Pack<float, 4>;
  constexpr int kMost = 256, kPart = kMost + 4;
  const AttentionParams& a = p.a;
  const int rows = int(p.rows_most), x = int(blockIdx.x) / rows, r = int(blockIdx.x) % rows;
  const int hkv = x % a.Hkv, b = x / a.Hkv;
  const Sequence s = sequence_of(a, b);
  if (r >= s.Tq * a.group) return;
  const int count = splits_of(p, s.Tk).count, lane = lane_index();
  const int64_t first = (int64_t(b) * a.Hkv + hkv) * p.splits * p.rows_most + r;

  float top = -kInfinity;
  for (int n = lane; n < count; n += 32) top = fmaxf(top, p.part_lse[first + n * p.rows_most]);
  top = warp_max(top);
  const float shift = top == -kInfinity ? 0 : top;
  float sum = 0;
  Four out[2] = {};
#pragma unroll 4
  for (int n = warp_index(); n < count; n += kCombineWarps) {
    const int64_t at = first + n * p.rows_most;
    const float weight = exp2_fast(p.part_lse[at] - shift);
    sum += weight;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = 4 * lane + 128 * half;
      if (column >= a.Dv) continue;
      const Four part = load_global(reinterpret_cast<const Four*>(p.part_out + at * a.Dv + column));
#pragma unroll
      for (int e = 0; e < 4; ++e) out[half].x[e] += weight * part.x[e];
    }
  }
  float* const scratch = reinterpret_cast<float*>(shared_memory());  // [warp][columns, sum]
  float* const to = scratch + warp_index() * kPart;
  store_shared(reinterpret_cast<Four*>(to + 4 * lane), out[0]);
  store_shared(reinterpret_cast<Four*>(to + 128 + 4 * lane), out[1]);
  if (lane == 0) store_shared(to + kMost, sum);
  __syncthreads();

  sum = 0;
  for (int w = 0; w < kCombineWarps; ++w) sum += load_shared(scratch + w * kPart + kMost);
  const int head = hkv * a.group + r % a.group, i = r / a.group;
  const Normaliser norm = normalise(top, sum, a.sinks ? a.sinks + head : nullptr);
  T* const row = static_cast<T*>(a.out) + offset_of(a.os, b, s.q0, head, i);
  for (int column = int(threadIdx.x); column < a.Dv; column += 32 * kCombineWarps) {
    float all = 0;
    for (int w = 0; w < kCombineWarps; ++w) all += load_shared(scratch + w * kPart + column);
    row[column] = narrow<T>(all * norm.scale);
  }
  if (threadIdx.x == 0) a.lse[b * a.lse_b + head * a.lse_h + s.q0 + i] = norm.lse * kLn2;
}
inline constexpr size_t kCombineBytes = kCombineWarps * (256 + 4) * sizeof(float);

}  // namespace fastlm::cuda
