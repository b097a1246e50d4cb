// Attention's backward on a GPU: gradients of what is added to the scores, and sums over parts.
//
// The gradient of a mask is dS summed over the dimensions along which the mask was broadcast, in float32.
// A block owns a tile of the mask, or a part of the tiles of scores that it was added to, and goes through
// them in order. Q, K, dO and V pass in chunks of columns, so one kernel serves all head sizes.
//
// The gradients of a slope and of a sink are sums over rows, of one block each.
#pragma once
#include "attention_backward_tile.cuh"

namespace fastlm::cuda {

// ---- mask ----------------------------------------------------------------------------------

inline constexpr int kMaskRows = 64, kMaskKeys = 64, kMaskThreads = 128;

// A shape of ScoreTiles: queries of one head stay.
template <class T_> struct MaskShape {
  using T = T_;
  static constexpr bool kKeys = false, kOptions = true;
  static constexpr int M = 1, N = kMaskKeys / 8;
  static constexpr int kColumns = 128 / sizeof(T);  // of a chunk
  static constexpr int kRowTile = kMaskRows * kColumns, kKeyTile = kMaskKeys * kColumns;
  static constexpr size_t kTileBytes = 2 * (kRowTile + kKeyTile) * sizeof(T);
  static constexpr size_t kSharedBytes = kTileBytes + kMaskRows * (sizeof(RowStats) + sizeof(Row));
};

// x = Q K^T and d = dO V^T of a warp's 16 rows.
template <class T>
FASTLM_DEVICE void mask_products(const AttentionBackwardParams& p, const Sequence& s, int b, int head, int i0, int j0,
                                 float (&x)[1][kMaskKeys / 8][4], float (&d)[1][kMaskKeys / 8][4]) {
  using S = MaskShape<T>;
  using Columns = Tile<T, S::kColumns>;
  const AttentionParams& a = p.a;
  const int hkv = head / a.group, warp = warp_index() * 16;
  const T* const q = static_cast<const T*>(a.q) + offset_of(a.qs, b, s.q0, head, i0);
  const T* const k = static_cast<const T*>(a.k) + offset_of(a.ks, b, s.k0, hkv, j0);
  const T* const dout = static_cast<const T*>(p.dout) + offset_of(p.dos, b, s.q0, head, i0);
  const T* const v = static_cast<const T*>(a.v) + offset_of(a.vs, b, s.k0, hkv, j0);
  T* const data = reinterpret_cast<T*>(shared_memory());
  const auto row_tile = [&](int stage) { return Columns{data + stage * (S::kRowTile + S::kKeyTile)}; };
  const auto key_tile = [&](int stage) { return Columns{data + stage * (S::kRowTile + S::kKeyTile) + S::kRowTile}; };
  const int chunks = (a.D + S::kColumns - 1) / S::kColumns, all = chunks + (a.Dv + S::kColumns - 1) / S::kColumns;
  const auto load = [&](int n, int stage) {
    const bool scores = n < chunks;
    const int column = (scores ? n : n - chunks) * S::kColumns, columns = (scores ? a.D : a.Dv) - column;
    copy_tile<kMaskRows, kMaskThreads>(row_tile(stage), (scores ? q : dout) + column, scores ? a.qs.t : p.dos.t,
                                       s.Tq - i0, columns);
    copy_tile<kMaskKeys, kMaskThreads>(key_tile(stage), (scores ? k : v) + column, scores ? a.ks.t : a.vs.t,
                                       s.Tk - j0, columns);
  };
  stream_tiles(0, all, 1, 2, load, [&](int n, int stage) {
    if (n < chunks) multiply_rows<S::kColumns>(x, row_tile(stage), warp, key_tile(stage), 0);
    else multiply_rows<S::kColumns>(d, row_tile(stage), warp, key_tile(stage), 0);
  });
}

// total += dS of the tile of scores from query i0 and key j0 on.
template <class T>
FASTLM_DEVICE void add_score_gradients(const AttentionBackwardParams& p, const Sequence& s, int b, int head, int i0,
                                       int j0, float (&total)[kMaskKeys / 8][4]) {
  using S = MaskShape<T>;
  const AttentionParams& a = p.a;
  RowStats* const stats = reinterpret_cast<RowStats*>(shared_memory() + S::kTileBytes);
  Row* const rows = reinterpret_cast<Row*>(stats + kMaskRows);
  const int hkv = head / a.group, mine = int(threadIdx.x), warp = warp_index() * 16;
  if (mine < kMaskRows) {
    const int r = (i0 + mine) * a.group + head % a.group;
    rows[mine] = row_of(a, s, b, hkv, r);
    RowStats row{kInfinity, 0};
    if (rows[mine].valid) row = load_global(p.stats + stats_at(p, s, b, hkv) + r);
    store_shared(stats + mine, row);
  }
  float x[1][kMaskKeys / 8][4] = {}, d[1][kMaskKeys / 8][4] = {};
  mask_products<T>(p, s, b, head, i0, j0, x, d);
  ScoreTiles<S>{p, s, b, i0 + warp}.template differentiate<true>(x, d, j0, stats + warp, rows + warp);
#pragma unroll
  for (int n = 0; n < kMaskKeys / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) total[n][c] += d[0][n][c];
  }
  __syncthreads();  // the next tile reuses the memory
}

// The tile of dmask from (i0, j0) on; its rows, its columns or both summed where the mask has one of them.
FASTLM_DEVICE void store_mask_gradient(const AttentionBackwardParams& p, const float (&total)[kMaskKeys / 8][4],
                                       bool sum_rows, bool sum_keys, int i0, int j0, float* to) {
  const int g = lane_index() / 4, t = lane_index() % 4, warp = warp_index();
  float* const scratch = reinterpret_cast<float*>(shared_memory());  // [warps][kMaskKeys]
  if (sum_rows && sum_keys) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kMaskKeys / 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum += total[n][c];
    sum = block_reduce<kMaskThreads / 32>(sum, scratch, [](float x, float y) { return x + y; });
    if (threadIdx.x == 0) to[0] = sum;
  } else if (sum_rows) {
#pragma unroll
    for (int n = 0; n < kMaskKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = total[n][c] + total[n][2 + c];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (g == 0) store_shared(scratch + warp * kMaskKeys + 8 * n + 2 * t + c, sum);
      }
    }
    __syncthreads();
    const int x = int(threadIdx.x);
    if (x >= kMaskKeys || j0 + x >= p.mask_Tk) return;
    float sum = 0;
    for (int w = 0; w < kMaskThreads / 32; ++w) sum += load_shared(scratch + w * kMaskKeys + x);
    to[j0 + x] = sum;
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + warp * 16 + g + 8 * half;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kMaskKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = j0 + 8 * n + 2 * t + c;
          sum += total[n][2 * half + c];
          if (!sum_keys && i < p.mask_Tq && j < p.mask_Tk) to[int64_t(i) * p.mask_Tk + j] = total[n][2 * half + c];
        }
      }
      sum = warp_sum<4>(sum);
      if (sum_keys && t == 0 && i < p.mask_Tq) to[i] = sum;
    }
  }
}

template <class T>
FASTLM_DEVICE void backward_mask(const AttentionBackwardParams& p) {
  const AttentionParams& a = p.a;
  const Sequence s = sequence_of(a, 0);
  const bool sum_rows = p.mask_Tq < a.Tq, sum_keys = p.mask_Tk < a.Tk;
  const auto blocks = [](int n, int size) { return (n + size - 1) / size; };
  const int tiles_i = blocks(p.mask_Tq, kMaskRows), tiles_j = blocks(p.mask_Tk, kMaskKeys);
  int64_t id = blockIdx.x;
  const int part = int(id % p.parts), mask_j = int(id / p.parts % tiles_j), mask_i = int(id / p.parts / tiles_j % tiles_i);
  id = id / p.parts / tiles_j / tiles_i;
  const int mask_h = int(id % p.mask_H), mask_b = int(id / p.mask_H);

  // The tiles of scores that this one was added to, keys innermost.
  const int n_b = a.B / p.mask_B, n_h = a.Hq / p.mask_H;
  const int n_i = sum_rows ? blocks(a.Tq, kMaskRows) : 1, n_j = sum_keys ? blocks(a.Tk, kMaskKeys) : 1;
  const int64_t steps = int64_t(n_b) * n_h * n_i * n_j, share = (steps + p.parts - 1) / p.parts;
  float total[kMaskKeys / 8][4] = {};
  for (int64_t step = part * share; step < steps && step < part * share + share; ++step) {
    const int j0 = (mask_j + int(step % n_j)) * kMaskKeys, i0 = (mask_i + int(step / n_j % n_i)) * kMaskRows;
    const int head = mask_h + int(step / n_j / n_i % n_h), b = mask_b + int(step / n_j / n_i / n_h);
    const int last = min(i0 + kMaskRows, s.Tq) - 1;
    if (j0 < keys_seen(s, last).hi && j0 + kMaskKeys > keys_seen(s, i0).lo)
      add_score_gradients<T>(p, s, b, head, i0, j0, total);
  }
  const int64_t mask_size = int64_t(p.mask_B) * p.mask_H * p.mask_Tq * p.mask_Tk;
  float* const to = p.dmask + part * mask_size + (int64_t(mask_b) * p.mask_H + mask_h) * p.mask_Tq * p.mask_Tk;
  store_mask_gradient(p, total, sum_rows, sum_keys, mask_i * kMaskRows, mask_j * kMaskKeys, to);
}

template <class T>
__global__ void __launch_bounds__(kMaskThreads, 2) attention_mask_backward(const __grid_constant__ AttentionBackwardParams p) {
  if constexpr (kServed<T>) backward_mask<T>(p);
}

// ---- slopes and sinks ----------------------------------------------------------------------

inline constexpr int kHeadThreads = 256;

// dslopes[b][h], the sum of row_sums over queries, or dsinks[h] = -sum of exp(sink - lse) delta over the batch
// too: one block each.
template <bool SINKS>
__global__ void __launch_bounds__(kHeadThreads) attention_head_backward(const __grid_constant__ AttentionBackwardParams p) {
  const AttentionParams& a = p.a;
  const int head = int(blockIdx.x) % a.Hq, b0 = int(blockIdx.x) / a.Hq;
  const float sink = SINKS ? a.sinks[head] * kLog2e : 0;
  float sum = 0;
  for (int b = b0; b < (SINKS ? a.B : b0 + 1); ++b) {
    const int64_t at = stats_at(p, sequence_of(a, b), b, head / a.group) + head % a.group;
    for (int i = int(threadIdx.x); i < a.Tq; i += kHeadThreads) {
      const int64_t r = at + int64_t(i) * a.group;
      if constexpr (SINKS) sum -= exp2_fast(sink - p.stats[r].lse) * p.stats[r].delta;
      else sum += p.row_sums[r];
    }
  }
  sum = block_reduce<kHeadThreads / 32>(sum, reinterpret_cast<float*>(shared_memory()), [](float x, float y) { return x + y; });
  if (threadIdx.x == 0) (SINKS ? p.dsinks : p.dslopes)[blockIdx.x] = sum;
}
inline constexpr size_t kHeadShared = kHeadThreads / 32 * sizeof(float);

// ---- parts ---------------------------------------------------------------------------------

// out[n] = the sum of from[part][n] over parts, in order.
struct PartsParams {
  const float* from;
  void* out;
  int64_t size;
  int parts;
};
inline constexpr int kPartsThreads = 256;

template <class T>
__global__ void __launch_bounds__(kPartsThreads) attention_sum_parts(const __grid_constant__ PartsParams p) {
  const int64_t n = int64_t(blockIdx.x) * kPartsThreads + threadIdx.x;
  if (n >= p.size) return;
  float sum = 0;
  for (int part = 0; part < p.parts; ++part) sum += load_global(p.from + part * p.size + n);
  store_global(static_cast<T*>(p.out) + n, narrow<T>(sum));
}

}  // namespace fastlm::cuda
