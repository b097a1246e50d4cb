// Attention's forward on a GPU: online softmax (Milakov and Gimelshein, 2018), a block of threads for a
// block of rows (FlashAttention-2: Dao, 2023).
//
// The rows r = i group + g of one key head share K and V, of which a ring of `stages` tiles each is copied
// to shared memory ahead of its use. Scores stay in registers from the first product to the second. Pieces
// of keys out of the band are skipped, those wholly inside run without a comparison.
//
// A tile is a piece of keys for each of key_warps warps. Where a key head has few rows, as in decoding, the
// warps that would have none share rows: warp w has the rows of w % row_warps, and of each tile the piece
// w / row_warps; their sums are joined at the end. Beyond that, keys are split among blocks, whose results
// attention_combine joins. Every join has a fixed order.
//
// Kept for the backward: lse = log sum exp S per row.
#pragma once
#include "attention_splits.cuh"

namespace fastlm::cuda {

// Warps of a block; accumulators of 16 rows that a warp has side by side; keys of a piece. A thread's 255
// registers hold sums (kTiles kD / 2 of them) and scores (kTiles kPiece / 2), and what options need; 64 KiB of
// shared memory hold Q and one stage of a piece.
template <class T, int kD, bool OPTIONS> struct ForwardShape {
  static constexpr int kWarps = 4, kTiles = kD <= 64 || (kD == 128 && !OPTIONS) ? 2 : 1;
  static constexpr int kPiece = OPTIONS ? (kD <= 128 ? 32 : 16) : (kD <= 64 ? 64 : 32);
};
template <int kD> struct ForwardShape<float, kD, true> {  // its products leave no time to gain without options
  static constexpr int kWarps = kD <= 128 ? 4 : 2, kTiles = kD <= 64 ? 2 : 1, kPiece = kD <= 128 ? 32 : 16;
};

// Floats of a warp in join_warps.
template <int TILES, int D> inline constexpr int kJoined = 4 * TILES * (D / 8 + 1) * 32;

template <class T, int kD, bool OPTIONS>
constexpr size_t forward_shared_bytes(int row_warps, int key_warps, int stages) {
  using Shape = ForwardShape<T, kD, OPTIONS>;
  const size_t ring = 2 * size_t(stages) * Tile<T, kD>::bytes(Shape::kPiece * key_warps);
  const size_t joined = size_t(key_warps - 1) * row_warps * kJoined<Shape::kTiles, kD> * sizeof(float);
  return Tile<T, kD>::bytes(16 * Shape::kTiles * row_warps) + (ring > joined ? ring : joined);
}

// ---- copies --------------------------------------------------------------------------------

// Keys from `first` on into a tile, zeros behind the last. base: of the tensor's pages, or of the head's keys.
template <int ROWS, int THREADS, class T, int COLUMNS>
FASTLM_DEVICE void copy_keys(const AttentionParams& p, const Sequence& s, const HeadStrides& at, Tile<T, COLUMNS> tile,
                             const T* base, int b, int h, int first, int columns) {
  if (!p.table) {
    copy_tile<ROWS, THREADS>(tile, base + first * at.t, at.t, s.Tk - first, columns);
    return;
  }
  constexpr int kChunks = Tile<T, COLUMNS>::kChunks, kAtOnce = THREADS / kChunks;
  const int c = int(threadIdx.x) % kChunks;
#pragma unroll kCopiesUnrolled
  for (int row = int(threadIdx.x) / kChunks; row < ROWS; row += kAtOnce) {
    const bool valid = first + row < s.Tk && c * kPerVector<T> < columns;
    const T* const key = valid ? base + key_offset(p, s, at, b, h, first + row) + c * kPerVector<T> : base;
    cp_async(tile.chunk(row, c), key, valid);
  }
}

// Query and head of rows r, r + by, ...: of one key head. Divisions take longer than what is done with a row.
struct QueryWalk {
  int i, head, i_by, head_by, group;
  FASTLM_DEVICE QueryWalk(int r, int by, int group)
      : i(r / group), head(r % group), i_by(by / group), head_by(by % group), group(group) {}
  FASTLM_DEVICE void step() {
    i += i_by;
    head += head_by;
    if (head >= group) {
      head -= group;
      ++i;
    }
  }
};

// Queries of the rows from `first` on into a tile of `size` rows, zeros behind the last.
template <int THREADS, class T, class Rows>
FASTLM_DEVICE void copy_queries(const AttentionParams& p, const Sequence& s, Rows tile, int b, int hkv, int first,
                                int size) {
  constexpr int kChunks = Rows::kChunks;
  const T* const base = static_cast<const T*>(p.q);
  static_assert(THREADS % kChunks == 0);
  constexpr int kAtOnce = THREADS / kChunks;
  const int mine = int(threadIdx.x) / kChunks, c = int(threadIdx.x) % kChunks;
  QueryWalk at(first + mine, kAtOnce, p.group);
#pragma unroll kCopiesUnrolled
  for (int row = mine; row < size; row += kAtOnce) {
    const bool valid = first + row < s.Tq * p.group && c * kPerVector<T> < p.D;
    const T* const from = base + offset_of(p.qs, b, s.q0, hkv * p.group + at.head, at.i);
    cp_async(tile.chunk(row, c), valid ? from + c * kPerVector<T> : base, valid);
    at.step();
  }
}

// ---- one piece of keys ---------------------------------------------------------------------

// Weights that dropout takes become 0. Two neighbours t share what they draw: four keys of two rows.
template <int P>
FASTLM_DEVICE void drop(const AttentionParams& p, const Row& up, const Row& down, int b, int j, float (&x)[P][4]) {
  const int t = lane_index() % 4;
  const uint32_t i = uint32_t(t % 2 ? down.i : up.i);
  const uint32_t head = uint32_t(int64_t(b) * p.Hq + (t % 2 ? down.head : up.head));
#pragma unroll
  for (int n = 0; n < P; ++n) {
    const RandomWords w = random_words(p.seed, uint32_t((j + 8 * n) / 4 + t / 2), i, head);
    const uint32_t theirs0 = __shfl_xor_sync(kAllLanes, t % 2 ? w.x[0] : w.x[2], 1);
    const uint32_t theirs1 = __shfl_xor_sync(kAllLanes, t % 2 ? w.x[1] : w.x[3], 1);
    const uint32_t words[4] = {t % 2 ? theirs0 : w.x[0], t % 2 ? theirs1 : w.x[1], t % 2 ? w.x[2] : theirs0,
                               t % 2 ? w.x[3] : theirs1};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (words[e] < p.drop_below) x[n][e] = 0;
  }
}

// Sums of a warp's 16 M rows, those at g and at g + 8 of each 16 in this lane, under maxima m of their logits.
// l has this lane's columns only.
template <int M, int N> struct RowSums {
  float out[M][N][4], m[M][2], l[M][2];

  FASTLM_DEVICE RowSums() {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      m[i][0] = m[i][1] = -kInfinity;
      l[i][0] = l[i][1] = 0;
#pragma unroll
      for (int n = 0; n < N; ++n) out[i][n][0] = out[i][n][1] = out[i][n][2] = out[i][n][3] = 0;
    }
  }
  // Of all lanes' columns, at the end.
  FASTLM_DEVICE void add_up() {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      l[i][0] = warp_sum<4>(l[i][0]);
      l[i][1] = warp_sum<4>(l[i][1]);
    }
  }
};

// How far, in base 2, a row's logits get ahead of its maximum before that and the sums follow. Behind the first keys
// they seldom do, and weights of 2^8 fit float16. In float32, where products take the time, there is nothing to gain.
template <class T> inline constexpr float kLag = sizeof(T) == 2 ? 8 : 0;

// Turns scores, in units of `factor`, into weights, which are added to l.
template <class T, int M, int N, int P>
FASTLM_DEVICE void softmax_piece(RowSums<M, N>& sums, float (&x)[M][P][4], float factor) {
  const auto lags = [](float m, float top) { return top > m + kLag<T>; };
  float top[M][2];
  bool any = false;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[m][half] = fmaxf(x[m][0][2 * half], x[m][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < P; ++n) top[m][half] = fmaxf(top[m][half], fmaxf(x[m][n][2 * half], x[m][n][2 * half + 1]));
      top[m][half] *= factor;
      any = any || lags(sums.m[m][half], top[m][half]);
    }
  }
  if (__any_sync(kAllLanes, any)) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[m][half] = warp_max<4>(top[m][half]);
        const bool follow = lags(sums.m[m][half], top[m][half]);
        const float alpha = follow ? exp2_fast(sums.m[m][half] - top[m][half]) : 1;
        if (follow) sums.m[m][half] = top[m][half];
        sums.l[m][half] *= alpha;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          sums.out[m][n][2 * half] *= alpha;
          sums.out[m][n][2 * half + 1] *= alpha;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = sums.m[m][half] == -kInfinity ? 0 : sums.m[m][half];  // of a row that has seen no key: 0
#pragma unroll
      for (int n = 0; n < P; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          x[m][n][e] = exp2_fast(x[m][n][e] * factor - shift);
          sums.l[m][half] += x[m][n][e];
        }
      }
    }
  }
}

// ---- results -------------------------------------------------------------------------------

// Adds up the sums of the warps that share rows, in their order, in the first. scratch: kJoined floats for
// each of the others, as [number][lane].
template <int NUMBERS, int M, int N>
FASTLM_DEVICE void join_warps(RowSums<M, N>& sums, float* scratch, int row_warps, int key_warps) {
  const int warp = warp_index(), part = warp / row_warps;
  scratch += lane_index();
  if (part > 0 && part < key_warps) {
    float* const to = scratch + (warp - row_warps) * NUMBERS;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_shared(to + (4 * m + half) * 32, sums.m[m][half]);
        store_shared(to + (4 * m + 2 + half) * 32, sums.l[m][half]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) store_shared(to + (4 * (M + m * N + n) + e) * 32, sums.out[m][n][e]);
      }
    }
  }
  __syncthreads();
  if (part > 0) return;
  for (int w = warp; w < (key_warps - 1) * row_warps; w += row_warps) {
    const float* const from = scratch + w * NUMBERS;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float mine[2], theirs[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old = sums.m[m][half], other = load_shared(from + (4 * m + half) * 32);
        const float top = fmaxf(old, other), shift = top == -kInfinity ? 0 : top;
        mine[half] = exp2_fast(old - shift);
        theirs[half] = exp2_fast(other - shift);
        sums.m[m][half] = top;
        sums.l[m][half] = sums.l[m][half] * mine[half] + load_shared(from + (4 * m + 2 + half) * 32) * theirs[half];
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sums.out[m][n][e] = sums.out[m][n][e] * mine[e / 2] +
                              load_shared(from + (4 * (M + m * N + n) + e) * 32) * theirs[e / 2];
      }
    }
  }
}

// Stores a warp's rows of the tile, 16 bytes a lane, as those from r of the output.
template <int ROWS, class T, class Rows>
FASTLM_DEVICE void store_rows(const AttentionParams& p, const Sequence& s, Rows tile, int row, int b, int hkv, int r) {
  using Vector = Pack<T, kPerVector<T>>;
  constexpr int kChunks = Rows::kChunks;
  T* const base = static_cast<T*>(p.out);
  constexpr int kAcross = kChunks < 32 ? kChunks : 32, kAtOnce = 32 / kAcross;
  const int mine = lane_index() / kAcross;
  QueryWalk at(r + mine, kAtOnce, p.group);
#pragma unroll 4
  for (int n = mine; n < ROWS && r + n < s.Tq * p.group; n += kAtOnce, at.step()) {
    T* const to = base + offset_of(p.os, b, s.q0, hkv * p.group + at.head, at.i);
    for (int c = lane_index() % kAcross; c < kChunks && c * kPerVector<T> < p.Dv; c += kAcross)
      store_global(reinterpret_cast<Vector*>(to + c * kPerVector<T>),
                   load_shared(reinterpret_cast<const Vector*>(tile.chunk(row + n, c))));
  }
}

// The results of a warp's rows, those from r of the key head, or of a split of their keys. l is whole; the tile has
// room for the rows from `row` on. SPLITS: there may be some.
template <class T, bool SPLITS, int M, int N, class Rows>
FASTLM_DEVICE void finish_rows(const ForwardParams& p, const Sequence& s, const RowSums<M, N>& sums, Rows tile, int row,
                               int b, int hkv, int split, int r) {
  constexpr int kRows = 16 * M;
  const AttentionParams& a = p.a;
  const int lane = lane_index(), g = lane / 4, t = lane % 4, rows = s.Tq * a.group;
  const int64_t partial = ((int64_t(b) * a.Hkv + hkv) * p.splits + split) * p.rows_most + r;
  const bool whole = !SPLITS || p.splits == 1;
  float lse = 0;  // of row r + lane
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = 16 * m + 8 * half + g;
      const float* const sink = a.sinks && whole ? a.sinks + hkv * a.group + (r + at) % a.group : nullptr;
      const Normaliser norm = normalise(sums.m[m][half], sums.l[m][half], sink);
      const float scale = norm.scale * a.keep_scale, theirs = __shfl_sync(kAllLanes, norm.lse, lane % 8 * 4);
      if (lane / 8 == 2 * m + half) lse = theirs;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float left = sums.out[m][n][2 * half] * scale, right = sums.out[m][n][2 * half + 1] * scale;
        const int column = 8 * n + 2 * t;
        if (whole)
          store_shared(reinterpret_cast<Pack<T, 2>*>(tile.at(row + at, column)),
                       Pack<T, 2>{narrow<T>(left), narrow<T>(right)});
        else if (r + at < rows && column < a.Dv)
          store_global(reinterpret_cast<float2*>(p.part_out + (partial + at) * a.Dv + column), make_float2(left, right));
      }
    }
  }
  const int at = r + lane;
  if (!whole) {
    if (lane < kRows && at < rows) p.part_lse[partial + lane] = lse;
    return;
  }
  if (lane < kRows && at < rows)
    a.lse[b * a.lse_b + (hkv * a.group + at % a.group) * a.lse_h + s.q0 + at / a.group] = lse * kLn2;
  __syncwarp();
  store_rows<kRows, T>(a, s, tile, row, b, hkv, r);
}

// ---- kernels -------------------------------------------------------------------------------

// OPTIONS: mask, slopes, softcap, dropout, or a scale that is not positive; looked at as they are given.
template <class T, int kD, bool OPTIONS> FASTLM_DEVICE void forward_rows(const ForwardParams& p) {
  using Shape = ForwardShape<T, kD, OPTIONS>;
  constexpr int kThreads = 32 * Shape::kWarps, kM = Shape::kTiles, kN = kD / 8, kRows = 16 * kM;
  constexpr int kPiece = Shape::kPiece;
  constexpr bool kAllMasked = OPTIONS && kD == 256;  // no registers are left for where the whole pieces are
  const AttentionParams& a = p.a;

  // The last rows of a causal sequence see the most keys: these blocks go first.
  const uint32_t x = blockIdx.x;
  const int split = int(x % uint32_t(p.splits));
  const auto [turn, hkv, b] = turn_of(a, x / uint32_t(p.splits), p.blocks, p.together);
  const int block_rows = kRows * p.row_warps, first = (p.blocks - 1 - turn) * block_rows;
  const Sequence s = sequence_of(a, b);
  const int rows = s.Tq * a.group;
  const KeySplits splits = splits_of(p, s.Tk);
  if (first >= rows || split >= splits.count) return;

  const int lo = split * splits.keys, hi = s.Tk - lo > splits.keys ? lo + splits.keys : s.Tk;
  const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
  const int part = warp / p.row_warps, warp_row = warp % p.row_warps * kRows, r = first + warp_row;
  const bool working = part < p.key_warps && r < rows;
  const int last = min(first + block_rows, rows) - 1;
  const KeyBlocks pieces = key_blocks<kPiece>(s, first / a.group, last / a.group, lo, hi);

  Tile<T, kD> q{reinterpret_cast<T*>(shared_memory())};
  T* const ring = q.data + block_rows * kD;
  const int tile_size = p.key_warps * kPiece * kD;
  const auto k_tile = [&](int stage) { return Tile<T, kD>{ring + 2 * stage * tile_size}; };
  const auto v_tile = [&](int stage) { return Tile<T, kD>{ring + (2 * stage + 1) * tile_size}; };
  const T* const k_base = static_cast<const T*>(a.k) + (a.table ? 0 : offset_of(a.ks, b, s.k0, hkv, 0));
  const T* const v_base = static_cast<const T*>(a.v) + (a.table ? 0 : offset_of(a.vs, b, s.k0, hkv, 0));
  const auto load = [&](int n, int stage) {
    Tile<T, kD> k = k_tile(stage), v = v_tile(stage);
    for (int i = n; i < min(n + p.key_warps, pieces.end); ++i) {
      copy_keys<kPiece, kThreads>(a, s, a.ks, k, k_base, b, hkv, i * kPiece, a.D);
      copy_keys<kPiece, kThreads>(a, s, a.vs, v, v_base, b, hkv, i * kPiece, a.Dv);
      k.data += kPiece * kD;
      v.data += kPiece * kD;
    }
  };
  copy_queries<kThreads, T>(a, s, q, b, hkv, first, block_rows);

  Row row[kM][2];  // without options found again where a piece is masked: registers are dearer
  const auto find_rows = [&] {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      row[m][0] = row_of(a, s, b, hkv, r + 16 * m + g);
      row[m][1] = row_of(a, s, b, hkv, r + 16 * m + g + 8);
    }
  };
  if constexpr (OPTIONS) find_rows();
  const float factor = OPTIONS ? 1 : a.scale * kLog2e;
  RowSums<kM, kN> sums;
  const auto use = [&](int n, int stage) {
    const int piece = n + part, start = piece * kPiece + 2 * t;
    if (!working || piece >= pieces.end) return;
    float scores[kM][kPiece / 8][4] = {};
    multiply_rows<kD>(scores, q, warp_row, k_tile(stage), part * kPiece);
    const auto key_at = [&](int, int n, int c) { return start + 8 * n + c % 2; };
    if constexpr (OPTIONS) {  // one tile of 16 rows at a time: of more, the loads of a mask take too many registers
#pragma unroll
      for (int m = 0; m < kM; ++m)
        logits<T>(a, s, reinterpret_cast<float (&)[1][kPiece / 8][4]>(scores[m]),
                  [&](int, int, int c) -> const Row& { return row[m][c / 2]; }, key_at, [](int, int, int, float) {});
    }
    if (kAllMasked || piece < pieces.full_begin || piece >= pieces.full_end) {
      if constexpr (!OPTIONS) find_rows();
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kPiece / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (!sees(s, row[m][c / 2].i, key_at(m, n, c))) scores[m][n][c] = -kInfinity;
        }
      }
    }
    softmax_piece<T>(sums, scores, factor);
    if (OPTIONS && a.dropout) {
#pragma unroll
      for (int m = 0; m < kM; ++m) drop(a, row[m][0], row[m][1], b, piece * kPiece, scores[m]);
    }
    multiply_registers(sums.out, scores, v_tile(stage), part * kPiece, 0);
  };
  stream_tiles(pieces.begin, pieces.end, p.key_warps, p.stages, load, use);
  cp_async_wait<0>();  // of Q, where no key is seen
  __syncthreads();

  sums.add_up();
  if (p.key_warps > 1)
    join_warps<kJoined<kM, kD>>(sums, reinterpret_cast<float*>(ring), p.row_warps, p.key_warps);
  if (!working || part > 0) return;

  finish_rows<T, true>(p, s, sums, q, warp_row, b, hkv, split, r);
}

template <class T, int kD, bool OPTIONS>
__global__ void __launch_bounds__(32 * ForwardShape<T, kD, OPTIONS>::kWarps, 2)
    attention_forward(const __grid_constant__ ForwardParams p) {
  if constexpr (kServed<T>) forward_rows<T, kD, OPTIONS>(p);
}

}  // namespace fastlm::cuda
