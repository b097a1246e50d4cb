// Attention's backward on a GPU: weights are computed again from lse (FlashAttention-2, arXiv:2307.08691).
//
//   P = exp(S - lse)   dV = (keep P)^T dO   dS = P (keep dO V^T - delta)   delta = rowsum(dO O) - dlse
//   dK = scale dS'^T Q   dQ = scale dS' K   where dS' is dS past the softcap
//
// A block of attention_backward_keys owns keys and sums dK and dV over the rows that see them, one of
// attention_backward_rows owns rows and sums dQ over keys: nothing is added atomically. Either side stays
// in shared memory while tiles of the other stream past; scores, weights and dS stay in registers. The rows
// of all query heads of a key head pass its keys, so that dK and dV are whole.
//
// In 16 bits P and dS are rounded before their products, as eager rounds them.
#pragma once
#include "attention_backward_tile.cuh"

namespace fastlm::cuda {

// ---- delta ---------------------------------------------------------------------------------

inline constexpr int kStatsThreads = 256, kStatsRows = kStatsThreads / 8;

// stats of kStatsRows rows of a key head, 8 lanes a row; and of the rows behind the last up to a multiple
// of 16, which see no key.
template <class T>
__global__ void __launch_bounds__(kStatsThreads) attention_row_stats(const __grid_constant__ AttentionBackwardParams p) {
  const AttentionParams& a = p.a;
  const int block = int(blockIdx.x) % p.blocks, hkv = int(blockIdx.x) / p.blocks % a.Hkv;
  const int b = int(blockIdx.x) / p.blocks / a.Hkv;
  const Sequence s = sequence_of(a, b);
  const int r = block * kStatsRows + int(threadIdx.x) / 8, all_rows = s.Tq * a.group;
  if (block * kStatsRows >= all_rows) return;
  const bool valid = r < all_rows;
  const int i = valid ? r / a.group : 0, head = hkv * a.group + (valid ? r % a.group : 0);
  const T* const out = static_cast<const T*>(a.out) + offset_of(a.os, b, s.q0, head, i);
  const T* const dout = static_cast<const T*>(p.dout) + offset_of(p.dos, b, s.q0, head, i);
  float sum = 0;
  for (int column = lane_index() % 8 * kPerVector<T>; valid && column < a.Dv; column += 8 * kPerVector<T>) {
    using Chunk = Pack<T, kPerVector<T>>;
    const Chunk x = load_global(reinterpret_cast<const Chunk*>(out + column));
    const Chunk y = load_global(reinterpret_cast<const Chunk*>(dout + column));
#pragma unroll
    for (int n = 0; n < kPerVector<T>; ++n) sum += widen(x.x[n]) * widen(y.x[n]);
  }
  sum = warp_sum<8>(sum);
  if (lane_index() % 8 || r >= (all_rows + 15) / 16 * 16) return;
  RowStats row{kInfinity, 0};
  if (valid) {
    const int64_t at = lse_at(a, s, b, head, i);
    const float lse = a.lse[at];
    row = {lse == -kInfinity ? kInfinity : lse * kLog2e, sum - (p.dlse ? p.dlse[at] : 0)};
  }
  p.stats[stats_at(p, s, b, hkv) + r] = row;
}

// ---- dK and dV -----------------------------------------------------------------------------

// DK, DV: which of them; heads of 256 have room in registers for one only.
template <class S, bool DK, bool DV>
FASTLM_DEVICE void backward_keys(const AttentionBackwardParams& p) {
  using T = typename S::T;
  constexpr int D = S::D, M = S::M, kStay = S::kStay, kStream = S::kStream, kThreads = S::kThreads;
  const AttentionParams& a = p.a;
  const auto [block, hkv, b] = turn_of(a, blockIdx.x, p.blocks, p.together);
  const int part = int(blockIdx.y);
  const Sequence s = sequence_of(a, b);
  const int j0 = block * kStay;  // the first keys of a causal sequence, which the most rows see, come first
  if (j0 >= s.Tk) return;

  Tile<T, D> k{reinterpret_cast<T*>(shared_memory())}, v{k.data + kStay * D};
  RowStats* const stats = reinterpret_cast<RowStats*>(k.data + (DK ? 2 : 1) * kStay * D);
  Row* const rows = reinterpret_cast<Row*>(stats + S::kInfo);
  T* const streams = reinterpret_cast<T*>(rows + (S::kOptions ? S::kInfo : 0));
  const auto q_tile = [&](int stage) { return Tile<T, D>{streams + stage * 2 * kStream * D}; };
  const auto dout_tile = [&](int stage) { return Tile<T, D>{streams + (stage * 2 + 1) * kStream * D}; };

  const int all_rows = s.Tq * a.group, warp = warp_index() * 16 * M;
  const StreamTiles<kStream> tiles(rows_seeing(s, a.group, j0), rows_seeing(s, a.group, min(j0 + kStay, s.Tk) - 1), all_rows);
  const int share = (max(tiles.to - tiles.from, 0) + p.parts - 1) / p.parts;
  const int from = tiles.from + part * share, to = min(from + share, tiles.to);
  ScoreTiles<S> scores{p, s, b, j0 + warp};

  const int64_t first_stats = stats_at(p, s, b, hkv);
  const auto load = [&](int n, int stage) {
    const int r = n * kStream;
    copy_rows<kStream, kThreads>(p, s, b, hkv, r, q_tile(stage), dout_tile(stage));
    copy_stats<kStream, kThreads>(stats + stage * kStream, p.stats + first_stats + r, all_rows - r);
    const int x = int(threadIdx.x);
    if (S::kOptions && x < kStream) rows[stage * kStream + x] = row_of(a, s, b, hkv, r + x);
  };
  float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
  const auto use = [&](int n, int stage) {
    const Tile<T, D> q = q_tile(stage), dout = dout_tile(stage);
    const RowStats* const tile_stats = stats + stage * kStream;
    const int r = n * kStream;
    float x[M][S::N][4] = {}, d[M][S::N][4] = {};
    multiply_rows<D>(x, k, warp, q, 0);
    if constexpr (DK) multiply_rows<D>(d, v, warp, dout, 0);
    if (!S::kOptions && tiles.is_whole(n)) scores.template differentiate<false>(x, d, r, tile_stats, nullptr);
    else scores.template differentiate<true>(x, d, r, tile_stats, rows + stage * kStream);
    if constexpr (DV) multiply_registers(dv, x, dout, 0, 0);
    if constexpr (DK) multiply_registers(dk, d, q, 0, 0);
  };
  if (from < to) {
    copy_tile<kStay, kThreads>(k, static_cast<const T*>(a.k) + offset_of(a.ks, b, s.k0, hkv, j0), a.ks.t, s.Tk - j0, a.D);
    if constexpr (DK)
      copy_tile<kStay, kThreads>(v, static_cast<const T*>(a.v) + offset_of(a.vs, b, s.k0, hkv, j0), a.vs.t, s.Tk - j0, a.Dv);
  }
  stream_tiles(from, to, 1, p.stages, load, use);

  const auto place = [&](auto* base, const HeadStrides& at, int x) {
    const uint32_t j = j0 + warp + x;
    return j < uint32_t(s.Tk) ? base + offset_of(at, b, s.k0, hkv, j) : nullptr;
  };
  if (p.parts > 1) {
    if constexpr (DK)
      store_part<D>(dk, a.scale, a.D, [&](int x) { return place(p.dk_parts + part * p.dk_size, p.dks, x); });
    if constexpr (DV) store_part<D>(dv, 1, a.Dv, [&](int x) { return place(p.dv_parts + part * p.dv_size, p.dvs, x); });
  } else {
    if constexpr (DK) store_sums(dk, a.scale, k, warp, a.D, [&](int x) { return place(static_cast<T*>(p.dk), p.dks, x); });
    if constexpr (DV)
      store_sums(dv, 1, DK ? v : k, warp, a.Dv, [&](int x) { return place(static_cast<T*>(p.dv), p.dvs, x); });
  }
}

template <class S, bool DK, bool DV>
__global__ void __launch_bounds__(S::kThreads, 2) attention_backward_keys(const __grid_constant__ AttentionBackwardParams p) {
  if constexpr (S::kHere) backward_keys<S, DK, DV>(p);
}

// ---- dQ ------------------------------------------------------------------------------------

template <class S> FASTLM_DEVICE void backward_rows(const AttentionBackwardParams& p) {
  using T = typename S::T;
  constexpr int D = S::D, M = S::M, kStay = S::kStay, kStream = S::kStream, kThreads = S::kThreads;
  const AttentionParams& a = p.a;
  const auto [turn, hkv, b] = turn_of(a, blockIdx.x, p.blocks, p.together);
  const Sequence s = sequence_of(a, b);
  const int r0 = (p.blocks - 1 - turn) * kStay,  // the last rows see the most keys
            all_rows = s.Tq * a.group;
  if (r0 >= all_rows) return;

  Tile<T, D> q{reinterpret_cast<T*>(shared_memory())}, dout{q.data + kStay * D};
  RowStats* const stats = reinterpret_cast<RowStats*>(q.data + 2 * kStay * D);
  Row* const rows = reinterpret_cast<Row*>(stats + S::kInfo);
  T* const streams = reinterpret_cast<T*>(rows + (S::kOptions ? S::kInfo : 0));
  const auto k_tile = [&](int stage) { return Tile<T, D>{streams + stage * 2 * kStream * D}; };
  const auto v_tile = [&](int stage) { return Tile<T, D>{streams + (stage * 2 + 1) * kStream * D}; };

  const StreamTiles<kStream> tiles(keys_seen(s, r0 / a.group), keys_seen(s, (min(r0 + kStay, all_rows) - 1) / a.group), s.Tk);
  const int warp = warp_index() * 16 * M, g = lane_index() / 4;
  const int64_t first_stats = stats_at(p, s, b, hkv) + r0;
  ScoreTiles<S> scores{p, s, b, r0 + warp};

  const T* const keys = static_cast<const T*>(a.k), *const values = static_cast<const T*>(a.v);
  const auto load = [&](int n, int stage) {
    const int j = n * kStream;
    copy_tile<kStream, kThreads>(k_tile(stage), keys + offset_of(a.ks, b, s.k0, hkv, j), a.ks.t, s.Tk - j, a.D);
    copy_tile<kStream, kThreads>(v_tile(stage), values + offset_of(a.vs, b, s.k0, hkv, j), a.vs.t, s.Tk - j, a.Dv);
  };
  float dq[M][D / 8][4] = {}, sums[M][2] = {};
  const auto use = [&](int n, int stage) {
    const Tile<T, D> k = k_tile(stage), v = v_tile(stage);
    const int j = n * kStream;
    float x[M][S::N][4] = {}, d[M][S::N][4] = {};
    multiply_rows<D>(x, q, warp, k, 0);
    multiply_rows<D>(d, dout, warp, v, 0);
    if (!S::kOptions && tiles.is_whole(n)) scores.template differentiate<false>(x, d, j, stats + warp, nullptr);
    else scores.template differentiate<true>(x, d, j, stats + warp, rows + warp);
    if (!S::kOptions || p.sums == kNoSums) multiply_registers(dq, d, k, 0, 0);
    else scores.add_sums(sums, d, j, rows + warp);
  };
  if (tiles.from < tiles.to) {
    copy_rows<kStay, kThreads>(p, s, b, hkv, r0, q, dout);
    copy_stats<kStay, kThreads>(stats, p.stats + first_stats, all_rows - r0);
  }
  if constexpr (S::kOptions)
    for (int x = int(threadIdx.x); x < kStay; x += kThreads) rows[x] = row_of(a, s, b, hkv, r0 + x);
  stream_tiles(tiles.from, tiles.to, 1, p.stages, load, use);

  if (!S::kOptions || p.sums == kNoSums) {
    store_sums(dq, a.scale, q, warp, a.D, [&](int x) -> T* {
      const int r = r0 + warp + x;
      if (r >= all_rows) return nullptr;
      return static_cast<T*>(p.dq) + offset_of(p.dqs, b, s.q0, hkv * a.group + r % a.group, r / a.group);
    });
  } else {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = warp_sum<4>(sums[m][half]);
        const int x = 16 * m + g + 8 * half, r = r0 + warp + x;
        if (lane_index() % 4 || r >= all_rows) continue;
        if (p.sums == kSlopeSums) {
          p.row_sums[first_stats + warp + x] = sum;
        } else {
          const int64_t at = lse_at(a, s, b, hkv * a.group + r % a.group, r / a.group);
          p.stats[first_stats + warp + x].delta = sum - (p.dlse ? p.dlse[at] : 0);
        }
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(S::kThreads, 2) attention_backward_rows(const __grid_constant__ AttentionBackwardParams p) {
  if constexpr (S::kHere) backward_rows<S>(p);
}

}  // namespace fastlm::cuda
