// Matrix products. Two levels:
//   matmul  C[M][N] (+)= A[M][K] B[K][N] on blocks that lie in cache, for fused bodies to inline
//   gemm    the same for whole matrices of any storage type and strides, packed and parallel
//
// The micro-kernel keeps kRows x 3 vectors of C in registers. Per step of k it loads 3 vectors of a
// row of B and broadcasts kRows elements of A straight from memory, so A needs no packing in either
// layout and C needs no transposition. This is the register-tiled scheme of Goto and van de Geijn
// (Anatomy of High-Performance Matrix Multiplication, 2008) with 4x3 tiles for 16 registers and 8x3
// for 32. Every element of C is summed over k in one fixed order, whatever the tile it falls into.
//
// Mul says what an element is: Float<T> multiplies T by T; Bf16Pair takes words of two bf16 along k.
#pragma once
#include "simd.h"

namespace fastlm::FASTLM_ISA {

template <class T> struct Float {
  using elem = T;
  using value = T;  // of which an element has one or two
  using acc = T;
  static FASTLM_INLINE Vec<T> madd(Vec<T> a, Vec<T> b, Vec<T> c) { return fma(a, b, c); }
};
struct Bf16Pair {
  using elem = uint32_t;
  using value = bf16;
  using acc = float;
  static FASTLM_INLINE Vec<float> madd(Words a, Words b, Vec<float> c) { return dot2(c, a, b); }
};

inline constexpr int kNV = 3;  // vectors in a row of a micro-tile

// A(m, k) is at a[m * lda + k], at a[k * lda + m], or in panels of kMR rows, which lda (the steps of a
// panel) tells apart: at a[(m - m % kMR) * lda + k * kMR + m % kMR].
enum Layout { kRowMajor, kColMajor, kPanels };
enum Update { kOverwrite, kAccumulate };

// c[r][v] = sum_k A(r, k) * b[k * ldb + v * lanes ...], added to what c holds.
template <class Mul, int kRows, int kVecs, Layout kA>
FASTLM_INLINE void micro(int64_t K, const typename Mul::elem* __restrict a, int64_t lda,
                         const typename Mul::elem* __restrict b, int64_t ldb,
                         Vec<typename Mul::acc> (&c)[kRows][kVecs]) {
  using E = typename Mul::elem;
  for (int64_t k = 0; k < K; ++k) {
    Vec<E> row[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) row[v] = load_raw<Vec<E>>(b + k * ldb + v * kLanes<E>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      E x;
      __builtin_memcpy(&x, kA == kRowMajor ? a + r * lda + k : a + k * (kA == kPanels ? kMR : lda) + r, sizeof x);
      const Vec<E> xs = splat<E>(x);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) c[r][v] = Mul::madd(xs, row[v], c[r][v]);
    }
  }
}

template <class Mul, int kRows, int kVecs, Layout kA, Update kUpdate>
inline __attribute__((noinline)) void tile(int64_t K, const typename Mul::elem* a, int64_t lda,
                                           const typename Mul::elem* b, int64_t ldb,
                                           typename Mul::acc* c, int64_t ldc) {
  using T = typename Mul::acc;
  if (kUpdate == kAccumulate && K <= 0) return;  // nothing to add, and no copies of C for that case
  // From C on, not added at the end: a sum has one order, in however many calls K is walked through.
  Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v)
      acc[r][v] = kUpdate == kAccumulate ? load<T>(c + r * ldc + v * kLanes<T>) : Vec<T>{};
  // The rows that come next: where C lies in memory they are too short for the hardware to see ahead.
  if (kUpdate == kAccumulate)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int i = 0; i < kVecs * kVectorBytes; i += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(c + (kRows + r) * ldc) + i, 1);
  micro<Mul, kRows, kVecs, kA>(K, a, lda, b, ldb, acc);
  // Rows' addresses are found again: kept from above they were on the stack and in vectors.
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, c += ldc) {
    asm("" : "+r"(c));
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) store(c + v * kLanes<T>, acc[r][v]);
  }
}

template <class Mul, int kVecs, Layout kA, Update kUpdate>
FASTLM_INLINE void column_of_tiles(int64_t M, int64_t K, const typename Mul::elem* a, int64_t lda,
                                   const typename Mul::elem* b, int64_t ldb,
                                   typename Mul::acc* c, int64_t ldc) {
  const auto rows_at = [&](int64_t m) {
    if constexpr (kA == kPanels) return a + m / kMR * kMR * lda + m % kMR;
    return a + m * (kA == kRowMajor ? lda : 1);
  };
  int64_t m = 0;
  for (; m + kMR <= M; m += kMR)
    tile<Mul, kMR, kVecs, kA, kUpdate>(K, rows_at(m), lda, b, ldb, c + m * ldc, ldc);
  if constexpr (kMR > 4)
    if (M - m >= 4) {
      tile<Mul, 4, kVecs, kA, kUpdate>(K, rows_at(m), lda, b, ldb, c + m * ldc, ldc);
      m += 4;
    }
  if (M - m >= 2) {
    tile<Mul, 2, kVecs, kA, kUpdate>(K, rows_at(m), lda, b, ldb, c + m * ldc, ldc);
    m += 2;
  }
  if (M - m >= 1) tile<Mul, 1, kVecs, kA, kUpdate>(K, rows_at(m), lda, b, ldb, c + m * ldc, ldc);
}

// Vectors in the first micro-tile of so many columns' vectors. Four are two and two: beside three, the sums of one
// would be too few for their latency.
FASTLM_INLINE constexpr int64_t first_vectors(int64_t vectors) {
  return vectors == 4 ? 2 : least<int64_t>(vectors, kNV);
}
// f(vector, vectors) of each micro-tile between two vectors of columns.
template <class Visit> FASTLM_INLINE void each_panel(int64_t first, int64_t last, const Visit& f) {
  for (int64_t v = first, n; v < last; v += n) {
    n = first_vectors(last - v);
    f(v, n);
  }
}

// C[M][N] (+)= A B for blocks in cache. N is a multiple of the lanes; M and K are any.
template <class Mul, Layout kA, Update kUpdate>
inline void matmul(int64_t M, int64_t N, int64_t K, const typename Mul::elem* a, int64_t lda,
                   const typename Mul::elem* b, int64_t ldb, typename Mul::acc* c, int64_t ldc) {
  constexpr int kL = kLanes<typename Mul::acc>;
  int64_t n = 0;
  for (; first_vectors((N - n) / kL) == kNV; n += kNV * kL)
    column_of_tiles<Mul, kNV, kA, kUpdate>(M, K, a, lda, b + n, ldb, c + n, ldc);
  for (; N - n >= 2 * kL; n += 2 * kL)
    column_of_tiles<Mul, 2, kA, kUpdate>(M, K, a, lda, b + n, ldb, c + n, ldc);
  if (N - n == kL) column_of_tiles<Mul, 1, kA, kUpdate>(M, K, a, lda, b + n, ldb, c + n, ldc);
}

// ---- packing ----

// dst[j * ldd + i] = src[i * lds + j] for kSide rows and columns of 4 bytes.
template <int kSide, class E> FASTLM_INLINE void transpose_square(const E* src, int64_t lds, E* dst, int64_t ldd) {
  typename VectorOf<uint32_t, 4 * kSide>::type r[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(&r[i], src + i * lds, 4 * kSide);
  transpose_square<kSide>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(dst + i * ldd, &r[i], 4 * kSide);
}

// dst[c * ldd + r] = src[r * lds + c], R rows of C columns. Pairs of bf16 at src may lie at any even address.
template <class E>
inline void transpose(int64_t R, int64_t C, const E* src, int64_t lds, E* dst, int64_t ldd) {
  const auto move = [&](int64_t r, int64_t c) FASTLM_INLINED {
    __builtin_memcpy(dst + c * ldd + r, src + r * lds + c, sizeof(E));
  };
  int64_t r = 0;
  if constexpr (sizeof(E) == 4) {
    const auto four_rows = [&](int64_t r, int64_t c) FASTLM_INLINED {  // from column c on
      for (; c + 4 <= C; c += 4) transpose_square<4>(src + r * lds + c, lds, dst + c * ldd + r, ldd);
      for (; c < C; ++c)
        for (int i = 0; i < 4; ++i) move(r + i, c);
    };
    constexpr int64_t kL = kLanes<E>;
    for (; r + kL <= R; r += kL) {
      int64_t c = 0;
      for (; c + kL <= C; c += kL) transpose_square<kL>(src + r * lds + c, lds, dst + c * ldd + r, ldd);
      for (int64_t i = 0; i < kL && c < C; i += 4) four_rows(r + i, c);
    }
    for (; r + 4 <= R; r += 4) four_rows(r, 0);
  }
  for (; r < R; ++r)
    for (int64_t c = 0; c < C; ++c) move(r, c);
}

// n elements of a strided row, converted to the compute type.
template <class T, class S>
FASTLM_INLINE void convert_row(int64_t n, const S* src, int64_t stride, T* dst) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(dst + i, load<T>(src + i));
    if (i < n) store(dst + i, load<T>(src + i, n - i), n - i);
    return;
  }
  for (; i < n; ++i) dst[i] = to_compute(src[i * stride]);
}

// The two ways a product reads a strided matrix. Along k: n elements of one row of A or one column of
// B, `stride` apart. Across k: n elements of step k, `stride` apart; Bf16Pair takes those of step k + 1 at
// `next` too, or zeros where that is null.
template <class T> struct Pack {
  static constexpr int kPair = 1;
  template <class S> static FASTLM_INLINE void along(int64_t n, const S* src, int64_t stride, T* dst) {
    convert_row(n, src, stride, dst);
  }
  template <class S>
  static FASTLM_INLINE void across(int64_t n, const S* src, int64_t stride, const S*, T* dst) {
    convert_row(n, src, stride, dst);
  }
};
template <> struct Pack<uint32_t> {
  static constexpr int kPair = 2;
  static FASTLM_INLINE uint32_t word(bf16 even, bf16 odd) { return even.bits | uint32_t(odd.bits) << 16; }
  static FASTLM_INLINE void along(int64_t n, const bf16* src, int64_t stride, uint32_t* dst) {
    if (n <= 0) return;
    if (n % 2) dst[n / 2] = 0;
    if (stride == 1) {
      __builtin_memcpy(dst, src, size_t(n) * sizeof(bf16));
      return;
    }
    for (int64_t i = 0; i + 2 <= n; i += 2) dst[i / 2] = word(src[i * stride], src[(i + 1) * stride]);
    if (n % 2) dst[n / 2] = src[(n - 1) * stride].bits;
  }
  static FASTLM_INLINE void across(int64_t n, const bf16* src, int64_t stride, const bf16* next, uint32_t* dst) {
    int64_t i = 0;
    if (stride == 1 && next)
      for (; i + kLanes<float> <= n; i += kLanes<float>) {
        const Words words = interleave(load_raw<Half>(src + i), load_raw<Half>(next + i));
        __builtin_memcpy(dst + i, &words, sizeof words);
      }
    for (; i < n; ++i) dst[i] = word(src[i * stride], next ? next[i * stride] : bf16{0});
  }
};

// A block of A, M rows by K steps, as rows of ldd elements.
template <class E, class S>
inline void pack_rows(int64_t M, int64_t K, const S* src, int64_t am, int64_t ak, E* dst, int64_t ldd) {
  for (int64_t m = 0; m < M; ++m) Pack<E>::along(K, src + m * am, ak, dst + m * ldd);
}

// The n elements at src into the cache. Rows of a matrix often lie a page apart, where the hardware sees no stream.
template <class S> FASTLM_INLINE void prefetch(int64_t n, const S* src) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(src + i, 0, 2);
}
inline constexpr int64_t kAhead = 32;  // steps of k between a row's prefetch and its packing

// The same where its rows lie side by side: as panels of kMR rows.
template <class E, class S>
inline void pack_row_panels(int64_t M, int64_t K, const S* src, int64_t ak, E* dst) {
  constexpr int64_t kRun = 64;
  E run[kRun];
  const int64_t words = ceil_div<int64_t>(K, Pack<E>::kPair);
  for (int64_t m0 = 0; m0 < M; m0 += kRun)
    for (int64_t w = 0; w < words; ++w) {
      const int64_t n = least(kRun, M - m0), k = w * Pack<E>::kPair;
      const S* from = src + m0 + k * ak;
      const E* row = run;
      for (int64_t i = 0; i < Pack<E>::kPair; ++i) prefetch(n, from + (kAhead + i) * ak);
      if constexpr (__is_same(E, S)) row = from;
      else Pack<E>::across(n, from, 1, k + 1 < K ? from + ak : nullptr, run);
      E* to = dst + m0 * words + w * kMR;
      int64_t m = 0;
      for (; m + kMR <= n; m += kMR) __builtin_memcpy(to + m * words, row + m, kMR * sizeof(E));
      if (m < n) __builtin_memcpy(to + m * words, row + m, size_t(n - m) * sizeof(E));
    }
}

// n rows of K steps, lds apart, as columns: dst[step][ldd]. `rows` holds a vector's worth of rows of K steps, for what
// can't be read as it lies.
template <class E, class S>
inline void pack_columns(int64_t n, int64_t K, const S* src, int64_t lds, E* dst, int64_t ldd, E* rows) {
  constexpr int64_t kPair = Pack<E>::kPair, kL = kLanes<E>;
  const int64_t words = ceil_div(K, kPair);
  if (sizeof(S) * kPair == sizeof(E) && K % kPair == 0 && lds % kPair == 0)
    return transpose(n, words, reinterpret_cast<const E*>(src), lds / kPair, dst, ldd);
  for (int64_t i = 0; i < n; i += kL) {
    const int64_t some = least(kL, n - i);
    pack_rows(some, K, src + i * lds, lds, 1, rows, words);
    transpose(some, words, rows, words, dst + i, ldd);
  }
}

// A block of B, K steps by n <= ldd columns, as one panel [steps][ldd], zeros in the columns behind n.
// `rows` as above.
template <class E, class S>
inline void pack_panel(int64_t K, int64_t n, const S* src, int64_t bk, int64_t bn, E* panel, int64_t ldd,
                       E* rows) {
  constexpr int64_t kPair = Pack<E>::kPair;
  const int64_t words = ceil_div(K, kPair);
  if (n < ldd) __builtin_memset(panel, 0, size_t(words * ldd) * sizeof(E));
  if (bk == 1 && bn != 1) return pack_columns(n, K, src, bn, panel, ldd, rows);
  for (int64_t w = 0; w < words; ++w) {
    const int64_t k = w * kPair;
    if (bn == 1)
      for (int64_t i = 0; i < kPair; ++i) prefetch(n, src + (k + kAhead + i) * bk);
    Pack<E>::across(n, src + k * bk, bn, k + 1 < K ? src + (k + 1) * bk : nullptr, panel + w * ldd);
  }
}

// ---- gemm ----

// c[m * ldc + n] (+)= sum_k a[m * am + k * ak] * b[k * bk + n * bn] (+ bias[n])
template <class SA, class SB, class SC> struct Gemm {
  int64_t M, N, K;
  const SA* a;
  int64_t am, ak;
  const SB* b;
  int64_t bk, bn;
  SC* c;
  int64_t ldc;
  const compute_t<SC>* bias = nullptr;  // [N]
  bool accumulate = false;
  int64_t shift = 0;  // row m of the product is row (m + shift) mod M of c
};

template <class A, class B> inline constexpr bool kSame = __is_same(A, B);
template <bool kPairs, class T> struct MulOf { using type = Float<T>; };
template <class T> struct MulOf<true, T> { using type = Bf16Pair; };
// How matrices of one storage type are multiplied.
template <class S> using ProductOf = typename MulOf<kHasBf16Dot && kSame<S, bf16>, compute_t<S>>::type;

// Tile sizes: a packed panel of B (kKC steps x one micro-tile) fills most of a 32 KiB first-level cache,
// the block of A most of the second level. Large tiles of C, summed beside it, pay for the packing of
// both: against 192 x 168, 384 x 336 took about 0.9 of the time (dW of a GRU layer, Zen 3).
template <class SA, class SB, class SC> struct Blocking {
  using Mul = typename MulOf<kHasBf16Dot && kSame<SA, bf16> && kSame<SB, bf16>, compute_t<SC>>::type;
  using E = typename Mul::elem;
  static constexpr int64_t kNR = kNV * kLanes<E>;
  static constexpr int64_t kWords = 24 * 1024 / (kNR * int64_t(sizeof(E)));  // a panel's height
  static constexpr int64_t kKC = kWords * Pack<E>::kPair;
  static constexpr int64_t kMC = 384;  // the largest tile of C
  static constexpr int64_t kNC = round_up<int64_t>(320, kNR);
};

// One tile of C: sums over blocks of k in the compute type, then bias and conversion.
template <class SA, class SB, class SC>
inline void gemm_tile(const Gemm<SA, SB, SC>& g, int64_t m0, int64_t M, int64_t n0, int64_t N) {
  using T = compute_t<SC>;
  using Block = Blocking<SA, SB, SC>;
  using Mul = typename Block::Mul;
  using E = typename Mul::elem;
  constexpr int64_t kL = kLanes<T>, kKC = Block::kKC, kNC = Block::kNC, kWords = Block::kWords;
  T* const acc = static_cast<T*>(thread_scratch(kScratchTile, Block::kMC * kNC * sizeof(T)));
  E* const packed_b = static_cast<E*>(
      thread_scratch(kScratchPack, (kWords * kNC + Block::kMC * kWords + kL * kWords) * sizeof(E)));
  E* const packed_a = packed_b + kWords * kNC;
  E* const rows = packed_a + Block::kMC * kWords;
  const int64_t vectors = ceil_div<int64_t>(N, kL);

  for (int64_t k0 = 0; k0 < greatest<int64_t>(g.K, 1); k0 += kKC) {
    const int64_t K = least(kKC, g.K - k0), words = ceil_div<int64_t>(K, Pack<E>::kPair);
    each_panel(0, vectors, [&](int64_t v, int64_t width) {
      const int64_t n = v * kL, columns = width * kL;
      pack_panel(K, least(columns, N - n), g.b + k0 * g.bk + (n0 + n) * g.bn, g.bk, g.bn, packed_b + n * kWords,
                 columns, rows);
    });
    const SA* block = g.a + m0 * g.am + k0 * g.ak;
    const E* a = packed_a;
    int64_t lda = kWords;
    const bool in_panels = g.am == 1 && g.ak != 1;
    if (in_panels) {
      pack_row_panels(M, K, block, g.ak, packed_a);
      lda = words;
    } else if (kSame<SA, E> && g.ak == 1) {  // read in place
      a = reinterpret_cast<const E*>(block);
      lda = g.am;
    } else {
      pack_rows(M, K, block, g.am, g.ak, packed_a, lda);
    }
    each_panel(0, vectors, [&](int64_t v, int64_t width) {
      const int64_t n = v * kL, columns = width * kL;
      const E* panel = packed_b + n * kWords;
      T* c = acc + n;
      if (k0 == 0 && in_panels) matmul<Mul, kPanels, kOverwrite>(M, columns, words, a, lda, panel, columns, c, kNC);
      else if (k0 == 0) matmul<Mul, kRowMajor, kOverwrite>(M, columns, words, a, lda, panel, columns, c, kNC);
      else if (in_panels) matmul<Mul, kPanels, kAccumulate>(M, columns, words, a, lda, panel, columns, c, kNC);
      else matmul<Mul, kRowMajor, kAccumulate>(M, columns, words, a, lda, panel, columns, c, kNC);
    });
  }
  for (int64_t m = 0; m < M; ++m) {
    SC* const row = g.c + (m0 + m + g.shift) % g.M * g.ldc + n0;
    for (int64_t n = 0; n < N; n += kL) {
      const int64_t w = least(kL, N - n);
      Vec<T> v = load(acc + m * kNC + n);
      if (g.bias) v += load(g.bias + n0 + n, w);
      if (g.accumulate) v += load<T>(row + n, w);
      if (w == kL) store(row + n, v);
      else store(row + n, v, w);
    }
  }
}

// The tiles of an M x N product that take the least time: that of the busiest thread's, in multiply-adds for a step of
// k. How C is cut changes no sum.
struct Tiles { int64_t M, N; };
template <class Block> inline Tiles cut(int64_t M, int64_t N, int64_t threads) {
  constexpr int64_t kPacking = 8;  // the time of an element of A or B, in that of a lane's multiply-add
  constexpr int64_t kLeastM = 8 * kMR, kLeastN = 2 * Block::kNR;
  const int64_t rows = ceil_div(M, Block::kMC), columns = ceil_div(N, Block::kNC);
  Tiles best{};
  int64_t least_time = 0;
  for (int64_t r = rows; r == rows || (r <= rows + threads && r <= M / kLeastM); ++r)
    for (int64_t c = columns; c == columns || (c <= columns + threads && c <= N / kLeastN); ++c) {
      const Tiles tile{round_up<int64_t>(ceil_div(M, r), kMR), round_up<int64_t>(ceil_div(N, c), Block::kNR)};
      const int64_t m = least(tile.M, M), n = least(tile.N, N);
      const int64_t rounds = ceil_div(ceil_div(M, tile.M) * ceil_div(N, tile.N), threads);
      const int64_t time = rounds * (m * n + kPacking * (m + n));
      if (best.M == 0 || time < least_time) best = tile, least_time = time;
    }
  return best;
}

template <class SA, class SB, class SC> inline void gemm(const Pool& pool, const Gemm<SA, SB, SC>& g) {
  if (g.M <= 0 || g.N <= 0) return;
  const auto [M, N] = cut<Blocking<SA, SB, SC>>(g.M, g.N, greatest(pool.threads, 1));
  const int64_t rows = ceil_div(g.M, M);
  parallel_items(pool, rows * ceil_div(g.N, N), [&, M = M, N = N](int64_t i) {
    const int64_t m = (i % rows) * M, n = (i / rows) * N;
    gemm_tile(g, m, least(M, g.M - m), n, least(N, g.N - n));
  });
}

}  // namespace fastlm::FASTLM_ISA
