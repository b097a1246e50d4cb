// Attention's backward on a GPU, what its kernels share: the parameters, which rows see which keys, a tile
// of scores and its gradient, tiles that stream through shared memory, and sums on their way out.
#pragma once
#include "attention.cuh"

namespace fastlm::cuda {

// lse in base 2, inf for a row that sees no key: its weights are 0.
struct alignas(8) RowStats { float lse, delta; };

// What is asked of a row's or a tile's dS beside the gradients of Q, K and V.
enum DsSums : int { kNoSums, kSlopeSums, kDeltaSums, kMaskSums };

struct AttentionBackwardParams {
  AttentionParams a;         // of the forward, with its out and lse
  const void* dout;
  HeadStrides dos;
  const float* dlse;         // laid out as lse, or null
  void *dq, *dk, *dv;
  HeadStrides dqs, dks, dvs;
  RowStats* stats;           // see stats_at
  int64_t stats_b, stats_h;
  int blocks;                // of what stays, per key head of a sequence
  int together;              // heads_together
  int stages;                // tiles of what streams: 2, or 1 where shared memory is dear
  int parts;                 // blocks of keys share the rows, in order; above 1 they give their sums to:
  float *dk_parts, *dv_parts;     // [parts][dk_size], in each the places of dk
  int64_t dk_size, dv_size;
  DsSums sums;
  float* row_sums;           // of slopes, laid out as stats
  int mask_B, mask_H, mask_Tq, mask_Tk;  // sizes of the mask; 1 where broadcast
  float* dmask;              // [parts][size of the mask]
  float *dslopes, *dsinks;   // [B][Hq], [Hq]
};

// First row of a key head in stats: rows r in order; each sequence begins at a multiple of 16 rows.
FASTLM_DEVICE int64_t stats_at(const AttentionBackwardParams& p, const Sequence& s, int b, int hkv) {
  return hkv * p.stats_h + (p.a.cu_q ? (s.q0 * p.a.group / 16 + b) * 16 : b * p.stats_b);
}

FASTLM_DEVICE int64_t lse_at(const AttentionParams& a, const Sequence& s, int b, int head, int i) {
  return b * a.lse_b + head * a.lse_h + s.q0 + i;
}

// ---- who sees whom -------------------------------------------------------------------------

// From lo up to hi; neither end is within the side that streams where the band is open.
struct Range { int lo, hi; };

FASTLM_DEVICE Range range_of(int64_t lo, int64_t hi) {
  const auto clamp = [](int64_t x) { return int(x < -kUnbounded ? -kUnbounded : x > kUnbounded ? kUnbounded : x); };
  return {clamp(lo), clamp(hi)};
}
// Both ends grow with i, and with j.
FASTLM_DEVICE Range keys_seen(const Sequence& s, int i) {
  return range_of(int64_t(i) - s.lower, int64_t(i) + s.upper + 1);
}
FASTLM_DEVICE Range rows_seeing(const Sequence& s, int group, int j) {
  return range_of((int64_t(j) - s.upper) * group, (int64_t(j) + s.lower + 1) * group);
}

// Tiles of SIZE of n that stream past what stays, of which the first sees `first` and the last `last`: those
// from `from` up to `to` hold something that is seen, and is_whole says whether all of one is by all.
template <int SIZE> struct StreamTiles {
  int from, to, all_from, all_to;
  FASTLM_DEVICE StreamTiles(Range first, Range last, int n)
      : from(max(first.lo, 0) / SIZE), to((min(last.hi, n) + SIZE - 1) / SIZE), all_from(last.lo),
        all_to(min(first.hi, n) - SIZE) {}
  FASTLM_DEVICE bool is_whole(int tile) const { return tile * SIZE >= all_from && tile * SIZE <= all_to; }
};

// ---- shapes --------------------------------------------------------------------------------

// KEYS: keys stay and rows stream, else rows stay. A warp has 16 M of what stays, and 8 N of what streams
// at a time. Two tiles of 16 share what is read of the other side where registers and shared memory allow it; OPTIONS, as
// in `logits`, need some. SMALL: for sm_75, from heads of 64 on: a block has 64 KiB of shared memory there,
// and copies pass through registers.
template <class T_, int D_, bool KEYS, bool OPTIONS, bool SMALL> struct BackwardShape {
  using T = T_;
  static constexpr int D = D_;
  static constexpr bool kKeys = KEYS, kOptions = OPTIONS, kHalf = sizeof(T) == 2;
  static constexpr int M = kTensorCores<T> && D <= (KEYS || !kHalf ? 64 : 128) ? 2 : 1;
  static constexpr int kMost = kHalf && D <= 64 && !KEYS && !OPTIONS && !SMALL ? 8 : kHalf || D <= 64 ? 4 : 2;
  static constexpr int N = kMost / ((M == 2 && OPTIONS) || (SMALL && (kHalf || D == 256)) ? 2 : 1);
  static constexpr int kWarps = (kHalf || D < 256 ? 4 : 2) / (SMALL && D >= 128 ? 2 : 1);
  static constexpr int kStay = 16 * M * kWarps, kStream = 8 * N, kThreads = 32 * kWarps;
#ifdef __CUDA_ARCH__
  static constexpr bool kHere = kServed<T> && (D < 64 || SMALL == (__CUDA_ARCH__ < 800));  // else nobody launches it
#else
  static constexpr bool kHere = true;
#endif

  static constexpr int kInfo = KEYS ? 2 * kStream : kStay;  // rows with stats, of two stages where they stream

  // tiles: those that stay, 1 or 2.
  static size_t shared_bytes(int tiles, int stages) {
    return (size_t(tiles) * kStay + size_t(stages) * 2 * kStream) * D * sizeof(T) +
           kInfo * (sizeof(RowStats) + (OPTIONS ? sizeof(Row) : 0));
  }
};

// ---- dropout -------------------------------------------------------------------------------
// Bit 4 n + c says that the weight of c[n][c] is kept. A block of Philox has words for 4 keys: lanes draw
// different blocks and trade words.

// Rows along the tile's rows, keys along its columns from first_key on. head and i: of row lane / 4, or in
// odd lanes of row lane / 4 + 8.
template <int N>
FASTLM_DEVICE uint32_t kept_along_columns(const AttentionParams& a, int64_t head, int i, int first_key) {
  const int t = lane_index() % 4, odd = t % 2;
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const RandomWords w = random_words(a.seed, uint32_t(first_key / 4 + 2 * n + t / 2), uint32_t(i), uint32_t(head));
    const uint32_t x = __shfl_xor_sync(kAllLanes, odd ? w.x[0] : w.x[2], 1);
    const uint32_t y = __shfl_xor_sync(kAllLanes, odd ? w.x[1] : w.x[3], 1);
    const uint32_t words[4] = {odd ? x : w.x[0], odd ? y : w.x[1], odd ? w.x[2] : x, odd ? w.x[3] : y};
#pragma unroll
    for (int c = 0; c < 4; ++c) kept |= uint32_t(words[c] >= a.drop_below) << (4 * n + c);
  }
  return kept;
}

// Keys along the tile's rows from first_key on, rows along its columns.
template <int N>
FASTLM_DEVICE uint32_t kept_along_rows(const AttentionParams& a, int b, const Row* rows, int first_key) {
  const int lane = lane_index(), t = lane % 4, own = lane / 4 % 4;
  const uint32_t block = uint32_t(first_key + lane / 16 * 4 + own / 2 * 8) / 4;
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Row& row = rows[8 * n + 2 * t + own % 2];
    const RandomWords w = random_words(a.seed, block, uint32_t(row.i), uint32_t(int64_t(b) * a.Hq + row.head));
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
      const int other = own ^ turn;
      const uint32_t theirs = other & 2 ? (other & 1 ? w.x[3] : w.x[2]) : (other & 1 ? w.x[1] : w.x[0]);
      const uint32_t word = __shfl_xor_sync(kAllLanes, theirs, 4 * turn);
      kept |= uint32_t(word >= a.drop_below) << (4 * n + other);
    }
  }
  return kept;
}

// ---- one tile ------------------------------------------------------------------------------

// A warp's tiles of scores: x, Q K^T, become the weights that met the values, and d, dO V^T, becomes the
// gradient of scale Q K^T, or dS where sums of it are asked for. Either side first.
template <class S> struct ScoreTiles {
  static constexpr int M = S::M, N = S::N;
  const AttentionBackwardParams& p;
  const Sequence& s;
  int b;
  int stay;                      // its first row or key

  // stats, rows: of the tile's rows that stream, or of the warp's that stay.
  template <bool EDGE>
  FASTLM_DEVICE void differentiate(float (&x)[M][N][4], float (&d)[M][N][4], int stream, const RowStats* stats,
                                   const Row* rows) {
    const AttentionParams& a = p.a;
    const int g = lane_index() / 4, t = lane_index() % 4;
    const auto stays = [&](int m, int c) { return 16 * m + g + c / 2 * 8; };
    const auto passes = [&](int n, int c) { return 8 * n + 2 * t + c % 2; };
    const auto row_at = [&](int m, int n, int c) -> const Row& { return rows[S::kKeys ? passes(n, c) : stays(m, c)]; };
    const auto key_at = [&](int m, int n, int c) { return S::kKeys ? stay + stays(m, c) : stream + passes(n, c); };
    const auto each = [&](const auto& change) {  // with lse and delta
      RowStats row[2 * M];  // two that stream, or all that stay
#pragma unroll
      for (int x = 0; !S::kKeys && x < 2 * M; ++x) row[x] = load_shared(stats + stays(0, 0) + 8 * x);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if constexpr (S::kKeys) load_two(row, stats + passes(n, 0));
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const RowStats& own = row[S::kKeys ? c % 2 : 2 * m + c / 2];
            change(m, n, c, own.lse, own.delta);
          }
        }
      }
    };
    // By this lane's first key, where keys stay. Found for each tile at an edge: registers are dearer.
    const Range seen = EDGE && S::kKeys ? rows_seeing(s, a.group, stay + g) : Range{};
    const auto sees_it = [&](int m, int n, int c) {
      const int at = stream + passes(n, c);
      if constexpr (S::kKeys) {
        const int further = (16 * m + c / 2 * 8) * a.group;
        return at - seen.lo >= further && at - seen.hi < further && at < s.Tq * a.group;
      }
      return sees(s, S::kOptions ? row_at(m, n, c).i : (stay + stays(m, c)) / a.group, at);
    };
    const auto weight = [&](float logit, int m, int n, int c, float lse) {
      return exp2_fast((!EDGE || sees_it(m, n, c) ? logit : -kInfinity) - lse);
    };

    if constexpr (!S::kOptions) {
      each([&](int m, int n, int c, float lse, float delta) {
        x[m][n][c] = weight(x[m][n][c] * (a.scale * kLog2e), m, n, c, lse);
        d[m][n][c] = x[m][n][c] * (d[m][n][c] - delta);
      });
    } else {
      uint32_t kept[M];
      if (a.dropout) {
#pragma unroll
        for (int m = 0; m < M; ++m) kept[m] = kept_weights(rows, m, stream);
      }
      const auto keep = [&](float value, int m, int n, int c) {
        return kept[m] >> (4 * n + c) & 1 ? value * a.keep_scale : 0;
      };
      if (a.dropout) each([&](int m, int n, int c, float, float) { d[m][n][c] = keep(d[m][n][c], m, n, c); });
      if (p.sums != kDeltaSums) each([&](int m, int n, int c, float, float delta) { d[m][n][c] -= delta; });
      logits<typename S::T>(a, s, x, row_at, key_at, [&](int m, int n, int c, float cap) {
        if (p.sums == kNoSums) d[m][n][c] *= 1 - cap * cap;
      });
      each([&](int m, int n, int c, float lse, float) {
        x[m][n][c] = weight(x[m][n][c], m, n, c, lse);
        d[m][n][c] *= x[m][n][c];
      });
      if (a.dropout) each([&](int m, int n, int c, float, float) { x[m][n][c] = keep(x[m][n][c], m, n, c); });
    }
  }

  static FASTLM_DEVICE void load_two(RowStats (&row)[2 * M], const RowStats* from) {
    const auto both = load_shared(reinterpret_cast<const Pack<float, 4>*>(from));
    row[0] = {both.x[0], both.x[1]};
    row[1] = {both.x[2], both.x[3]};
  }

  FASTLM_DEVICE uint32_t kept_weights(const Row* rows, int m, int stream) const {
    if constexpr (S::kKeys) return kept_along_rows<N>(p.a, b, rows, stay + 16 * m);
    const Row& row = rows[16 * m + lane_index() / 4 + lane_index() % 2 * 8];
    return kept_along_columns<N>(p.a, int64_t(b) * p.a.Hq + row.head, row.i, stream);
  }

  // What the rows that stay get of the sum that is asked for, from one tile.
  FASTLM_DEVICE void add_sums(float (&sums)[M][2], const float (&ds)[M][N][4], int stream, const Row* rows) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int distance = rows[16 * m + g + c / 2 * 8].i + (s.Tk - s.Tq) - (stream + 8 * n + 2 * t + c % 2);
          sums[m][c / 2] += p.sums == kSlopeSums ? -ds[m][n][c] * fabsf(float(distance)) : ds[m][n][c];
        }
      }
    }
  }
};

// Rows of Q and dO from `first` on, of all query heads of a key head in turn.
template <int ROWS, int THREADS, class T, int D>
FASTLM_DEVICE void copy_rows(const AttentionBackwardParams& p, const Sequence& s, int b, int hkv, int first,
                             Tile<T, D> q, Tile<T, D> dout) {
  constexpr int kChunks = Tile<T, D>::kChunks;
  const AttentionParams& a = p.a;
  const T* const q_base = static_cast<const T*>(a.q) + offset_of(a.qs, b, s.q0, hkv * a.group, 0);
  const T* const dout_base = static_cast<const T*>(p.dout) + offset_of(p.dos, b, s.q0, hkv * a.group, 0);
#pragma unroll kCopiesUnrolled
  for (int n = 0; n < (ROWS * kChunks + THREADS - 1) / THREADS; ++n) {
    const int x = int(threadIdx.x) + n * THREADS, row = x / kChunks, c = x % kChunks, column = c * kPerVector<T>;
    if (ROWS * kChunks % THREADS && row >= ROWS) break;
    const int r = first + row, i = r / a.group, head = r - i * a.group;
    const bool valid = r < s.Tq * a.group;
    cp_async(q.chunk(row, c), q_base + head * a.qs.h + i * a.qs.t + column, valid && column < a.D);
    cp_async(dout.chunk(row, c), dout_base + head * p.dos.h + i * p.dos.t + column, valid && column < a.Dv);
  }
}

template <int ROWS, int THREADS>
FASTLM_DEVICE void copy_stats(RowStats* to, const RowStats* from, int rows) {
  static_assert(ROWS / 2 <= THREADS);
  const int x = 2 * int(threadIdx.x);
  if (x < ROWS) cp_async(to + x, from + x, x < rows);
}

// A warp's sums, times factor, through its rows of a tile from `row` on, which it alone reads, to global
// memory by 16 bytes. at(x): where row `row` + x begins, or null if it is not there.
template <class T, int D, int M, class At>
FASTLM_DEVICE void store_sums(const float (&c)[M][D / 8][4], float factor, Tile<T, D> tile, int row, int columns,
                              const At& at) {
  using Two = Pack<T, 2>;
  constexpr int kChunks = Tile<T, D>::kChunks, kChunk = kPerVector<T>;
  const int lane = lane_index(), t = lane % 4;
  const uint32_t first = tile.offset(row + lane / 4, 2 * t / kChunk) + 2 * t % kChunk * sizeof(T);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const uint32_t to = tile.moved(first, 8 * n / kChunk) + 16 * m * tile.kRowBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const pair = &c[m][n][2 * half];
        store_shared(reinterpret_cast<Two*>(tile.behind(to + 8 * half * tile.kRowBytes)),
                     Two{{narrow<T>(pair[0] * factor), narrow<T>(pair[1] * factor)}});
      }
    }
  }
  __syncwarp();
#pragma unroll 2
  for (int n = lane; n < 16 * M * kChunks; n += 32) {
    T* const to = at(n / kChunks);
    if (to && n % kChunks * kChunk < columns)
      store_global(reinterpret_cast<uint4*>(to) + n % kChunks,
                   load_shared(reinterpret_cast<const uint4*>(tile.chunk(row + n / kChunks, n % kChunks))));
  }
}

// The same of one part in float32, from registers: a warp's 8 x 4 pairs of columns fill sectors.
template <int D, int M, class At>
FASTLM_DEVICE void store_part(const float (&c)[M][D / 8][4], float factor, int columns, const At& at) {
  using Two = Pack<float, 2>;
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = at(16 * m + g + 8 * half);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        if (to && 8 * n + 2 * t < columns)  // rows are of whole chunks, in float32 of 4 columns
          store_global(reinterpret_cast<Two*>(to + 8 * n + 2 * t),
                       Two{{c[m][n][2 * half] * factor, c[m][n][2 * half + 1] * factor}});
    }
  }
}

}  // namespace fastlm::cuda
