// Attention's forward by products of warpgroups (wgmma), which compute capability 9.0 has: in 16 bits, without options,
// of heads up to 64 and up to 128, its keys not split. Otherwise as attention_forward.cuh.
//
// A warpgroup has 64 rows of one key head, their queries in registers. While it makes the weights of a piece of keys, the
// tensor cores multiply those of the piece before with V, and the queries with the piece behind (as in section 3.2 of
// FlashAttention-3: Shah et al., 2024). Weights are made under the maxima so far, without looking for larger ones: where
// one may be above 2^8, which their sums tell, they are made again.
#pragma once
#include "attention_forward.cuh"

namespace fastlm::cuda {

// A thread's registers hold sums (kD / 2), queries (kD / 4), and of two pieces scores and weights (kPiece * 3 / 2); 227 KiB
// of shared memory hold Q and three tiles of K and V. Three warpgroups are faster for long sequences of heads of 64, and
// slower for short ones.
template <int kD> struct WarpgroupShape {
  static constexpr int kWarpgroups = 2, kRows = 64 * kWarpgroups, kThreads = 128 * kWarpgroups;
  static constexpr int kPiece = 64, kTile = 2 * kPiece, kStages = 3;
  template <class T> using Rows = Panels<T, kD, kRows>;
  template <class T> using Keys = Panels<T, kD, kTile>;
  static constexpr size_t kSharedBytes = Rows<bf16>::kBytes + 2 * kStages * Keys<bf16>::kBytes;
};

// A thread's part in the copies of keys to tiles.
template <class T, class Tile, int THREADS> struct KeyCopies {
  static constexpr int kChunks = Tile::kChunks, kAtOnce = THREADS / kChunks, kRows = Tile::kRows;
  static_assert(THREADS % kChunks == 0 && kRows % kAtOnce == 0);

  const AttentionParams& p;
  const Sequence& s;
  const HeadStrides& at;
  int b, h, row, chunk;
  bool inside;
  const T* base;  // of the tensor's pages, or of what the thread would have of key 0

  FASTLM_DEVICE KeyCopies(const AttentionParams& p, const Sequence& s, const HeadStrides& at, const void* data, int b,
                          int h, int columns)
      : p(p), s(s), at(at), b(b), h(h), row(int(threadIdx.x) / kChunks), chunk(int(threadIdx.x) % kChunks),
        inside(chunk * 8 < columns) {
    base = static_cast<const T*>(data) + chunk * 8 + (p.table ? 0 : offset_of(at, b, s.k0, h, row));
  }
  // Of the keys from `first` on, which may be negative; zeros where there are none. The sequence has keys.
  FASTLM_DEVICE void start(Tile tile, int first) const {
    const auto copy = [&](int n, const T* from) {
      const bool valid = inside && uint32_t(first + row + n) < uint32_t(s.Tk);
      cp_async(tile.chunk(row + n, chunk), from, valid);
    };
    if (p.table) {
#pragma unroll kCopiesUnrolled
      for (int n = 0; n < kRows; n += kAtOnce) {
        const int key = min(max(first + row + n, 0), s.Tk - 1);  // one that is in a page
        copy(n, base + key_offset(p, s, at, b, h, key));
      }
    } else {
      const T* next = base + first * at.t;
#pragma unroll
      for (int n = 0; n < kRows; n += kAtOnce, next += kAtOnce * at.t) copy(n, next);
    }
  }
};

// What logits are taken relative to, under a maximum m: of a row that has seen no key 0.
FASTLM_DEVICE float shift_of(float m) { return m == -kInfinity ? 0 : m; }

template <int N> FASTLM_DEVICE void scale_scores(float (&x)[N][4], float factor, const float (&shift)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) x[n][c] = x[n][c] * factor - shift[c / 2];
  }
}

// Weights of logits, as start_columns takes them, and the sums of this lane's.
template <class T, int N>
FASTLM_DEVICE void weigh(uint32_t (&words)[N / 2][4], float (&sum)[2], const float (&x)[N][4]) {
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float left = exp2_fast(x[n][2 * half]), right = exp2_fast(x[n][2 * half + 1]);
      sum[half] += left + right;
      words[n / 2][n % 2 * 2 + half] = pack(left, right, T{});
    }
  }
}

template <class T, int kD> FASTLM_DEVICE void forward_rows_by_warpgroups(const ForwardParams& p) {
  using Shape = WarpgroupShape<kD>;
  using Rows = typename Shape::template Rows<T>;
  using Keys = typename Shape::template Keys<T>;
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kPiece = Shape::kPiece;
  const AttentionParams& a = p.a;

  // The last rows of a causal sequence see the most keys: these blocks go first.
  const auto [turn, hkv, b] = turn_of(a, blockIdx.x, p.blocks, p.together);
  const int first = (p.blocks - 1 - turn) * kRows;
  const Sequence s = sequence_of(a, b);
  const int rows = s.Tq * a.group;
  if (first >= rows) return;

  const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
  const int r = first + 16 * warp;
  const auto pieces_of = [&](int from, int to) {
    return key_blocks<kPiece>(s, from / a.group, (min(to, rows) - 1) / a.group, 0, s.Tk);
  };
  const KeyBlocks all = pieces_of(first, first + kRows);
  const int group_first = min(first + warp / 4 * 64, rows - 1);
  const KeyBlocks mine = pieces_of(group_first, group_first + 64);  // whose scores are whole
  const int begin = all.begin / 2, end = (all.end + 1) / 2;         // in tiles of two pieces

  // A stage has tile n of V, and of K what is one piece further on: products read K before V.
  const Rows q_tile{reinterpret_cast<T*>(shared_memory())};
  T* const ring = q_tile.data + kRows * kD;
  const auto k_tile = [&](int stage) { return Keys{ring + 2 * stage * Shape::kTile * kD}; };
  const auto v_tile = [&](int stage) { return Keys{ring + (2 * stage + 1) * Shape::kTile * kD}; };
  const KeyCopies<T, Keys, kThreads> keys(a, s, a.ks, a.k, b, hkv, a.D), values(a, s, a.vs, a.v, b, hkv, a.Dv);
  const auto load = [&](int n, int stage) {
    keys.start(k_tile(stage), n * Shape::kTile + kPiece);
    values.start(v_tile(stage), n * Shape::kTile);
    cp_async_commit();
  };

  const float factor = a.scale * kLog2e;
  RowSums<1, kD / 8> sums;
  float (&m)[2] = sums.m[0], (&l)[2] = sums.l[0];
  float scores[2][kPiece / 8][4];
  uint32_t queries[kD / 16][4], weights[2][kPiece / 16][4];
  const auto mask = [&](float (&x)[kPiece / 8][4], int piece) {
    const int i_up = min((r + g) / a.group, s.Tq - 1), i_down = min((r + g + 8) / a.group, s.Tq - 1);
#pragma unroll
    for (int n = 0; n < kPiece / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (!sees(s, c < 2 ? i_up : i_down, piece * kPiece + 8 * n + 2 * t + c % 2)) x[n][c] = -kInfinity;
    }
  };
  const auto start_scores = [&](int half, int stage) {  // of the piece behind the one whose V the half has
    float (&x)[kPiece / 8][4] = scores[1 - half];
    wgmma_fence(x, queries);
    start_rows(x, queries, k_tile(stage), half * kPiece);
    wgmma_commit();
  };
  // The piece's scores are there. Under way are the products with V of the piece before, and the scores of the piece
  // behind, which are there after it.
  const auto use_piece = [&](int half, int n, int stage) {
    float (&x)[kPiece / 8][4] = scores[half];
    uint32_t (&words)[kPiece / 16][4] = weights[half];
    const int piece = 2 * n + half;
    if (piece < mine.full_begin || piece >= mine.full_end) mask(x, piece);
    const float shift[2] = {shift_of(m[0]), shift_of(m[1])};
    scale_scores(x, factor, shift);
    float sum[2];
    weigh<T>(words, sum, x);
    // The maxima lag until a weight may be more than 2^8.
    const bool lags = !(sum[0] <= 256 && sum[1] <= 256) || m[0] == -kInfinity || m[1] == -kInfinity;
    if (__any_sync(kAllLanes, lags)) {
      float alpha[2], by[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = -kInfinity;
#pragma unroll
        for (int n = 0; n < kPiece / 8; ++n) top = fmaxf(top, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
        const float most = fmaxf(m[i], shift[i] + warp_max<4>(top));
        alpha[i] = exp2_fast(m[i] - shift_of(most));
        by[i] = shift_of(most) - shift[i];
        m[i] = most;
        l[i] *= alpha[i];
      }
      scale_scores(x, 1, by);
      weigh<T>(words, sum, x);
      wgmma_wait<1>(sums.out[0], weights[1 - half]);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums.out[0][n][c] *= alpha[c / 2];
      }
    } else {  // each branch has its wait: behind both, the compiler would have it before the weights
      wgmma_wait<1>(sums.out[0], weights[1 - half]);
    }
    l[0] += sum[0];
    l[1] += sum[1];
    wgmma_fence(sums.out[0], words);
    start_columns(sums.out[0], words, v_tile(stage), half * kPiece);
    wgmma_commit();
    wgmma_wait<1>(scores[1 - half]);
  };
  const auto use_tile = [&](int n, int stage) {
    use_piece(0, n, stage);
    start_scores(1, stage);
    use_piece(1, n, stage);
  };
  const auto arrive = [&](auto pending) {
    cp_async_wait<decltype(pending)::value>();
    fence_for_products();
    __syncthreads();
  };

  copy_queries<kThreads, T>(a, s, q_tile, b, hkv, first, kRows);
  cp_async_commit();
  if (begin < end) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) load(begin - 1 + i, i);
    arrive(std::integral_constant<int, 1>{});
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) ldmatrix(queries[k], q_tile.chunk(16 * warp + lane % 16, 2 * k + lane / 16));
    start_scores(1, 0);
    wgmma_wait<0>(scores[0]);
    // Of three stages one is read, the next is on its way, and of the last products may still be under way. With the
    // last tile in the loop, the compiler would have no products under way from one tile to the next.
    int stage = 1;
#pragma unroll 1
    for (int n = begin; n < end - 1; ++n) {
      const int behind = stage == Shape::kStages - 1 ? 0 : stage + 1;
      arrive(std::integral_constant<int, 0>{});
      start_scores(0, stage);
      load(n + 1, behind);
      use_tile(n, stage);
      stage = behind;
    }
    arrive(std::integral_constant<int, 0>{});
    start_scores(0, stage);
    use_tile(end - 1, stage);
    wgmma_wait<0>(sums.out[0], weights[1], scores[0]);
  }
  cp_async_wait<0>();  // of Q, where no key is seen
  __syncthreads();

  sums.add_up();
  if (r < rows) finish_rows<T, false>(p, s, sums, q_tile, 16 * warp, b, hkv, 0, r);
}

// Its blocks can have no more than one warp where it is compiled for a GPU without these products.
template <class T, int kD>
__global__ void __launch_bounds__(kWarpgroupProducts ? WarpgroupShape<kD>::kThreads : 32, 1)
    attention_forward_warpgroups(const __grid_constant__ ForwardParams p) {
  if constexpr (kWarpgroupProducts) forward_rows_by_warpgroups<T, kD>(p);
}

}  // namespace fastlm::cuda
