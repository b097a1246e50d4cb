// Products of a few rows with a weight matrix, y = x W^T (* scale) (+ b), where reading W takes the time: linear
// layers as decoding takes them, and single steps of a GRU.
//
// M rows (tokens), K inputs, N outputs. x (M, K) of storage type S, y (M, N), b and scale (N) of Y; W of S or
// int8 lies by rows, (N, K), or by columns, (K, N). Each weight is read from memory once for kTokens tokens,
// widened in registers and multiplied by x in the compute type.
//
//   by rows      an output is a dot product
//   by columns   rows of W, times x, are added up within a part of K; then the parts' sums are
//
// Several rows go side by side, from distant places: a core waits for memory in each of these streams at the
// same time. Two threads of a Zen 3 read 61 GB/s so, where rows that follow each other in memory give 34.
//
// An output's sum has one order, which depends on K alone: not on the threads, nor on the tokens beside it.
#pragma once
#include "kernels.h"

namespace fastlm {

struct FewTokensParams {
  Pool pool;
  int64_t M, K, N;
  const void* x;
  const void* w;
  int64_t ldw;  // of W by rows, or of its transpose
  bool by_columns;
  const void* scale;  // null unless W is int8
  const void* bias;   // or null
  void* y;
  int64_t ldy;
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "simd.h"

namespace fastlm::FASTLM_ISA {

inline constexpr int kChains = 2, kRows = 4;          // of a dot product; dot products side by side
inline constexpr int kDepth = 8;                      // rows that are added at once
inline constexpr int64_t kPartRows = 64, kMaxParts = 32, kStrip = 4096;
inline constexpr int64_t kTokens = 8;                 // at once
inline constexpr int64_t kLeastBytes = 64 * 1024;     // of weights, for a thread to be worth waking

template <class S, class W, class Y> struct FewTokens {
  using T = compute_t<S>;
  static constexpr int kL = kLanes<T>;
  const FewTokensParams& p;
  const T* x;  // (M, K)

  const W* weights(int64_t row, int64_t column) const { return static_cast<const W*>(p.w) + row * p.ldw + column; }

  static int64_t grain(int64_t weights) { return ceil_div<int64_t>(kLeastBytes, weights * int64_t(sizeof(W)) + 1); }

  // step(n) for whole vectors of N elements, step(n, lanes) for what is left.
  template <class F> static FASTLM_INLINE void for_each_vector(int64_t N, const F& step) {
    int64_t n = 0;
    for (; n + kL <= N; n += kL) step(n);
    if (n < N) step(n, N - n);
  }

  // y[m][begin + n] for N outputs, each the sum of its sums in all parts.
  void finish(int64_t begin, int64_t N, const T* sums, int64_t ld, int64_t parts, int64_t part_size) const {
    for (int64_t m = 0; m < p.M; ++m)
      for_each_vector(N, [&](int64_t n, auto... lanes) {
        Vec<T> v = load<T>(sums + m * ld + n, lanes...);
        for (int64_t part = 1; part < parts; ++part) v += load<T>(sums + part * part_size + m * ld + n, lanes...);
        if (p.scale) v *= load<T>(static_cast<const Y*>(p.scale) + begin + n, lanes...);
        if (p.bias) v += load<T>(static_cast<const Y*>(p.bias) + begin + n, lanes...);
        store(static_cast<Y*>(p.y) + m * p.ldy + begin + n, v, lanes...);
      });
  }

  // ---- by rows ----

  // sums[m][n] for kM tokens from m on and kR outputs n, n + apart ... of the N whose weights begin at w.
  template <int kM, int kR> void dot_products(const W* w, int64_t m, int64_t n, int64_t apart, T* sums, int64_t N) const {
    Vec<T> acc[kChains][kM][kR] = {};
    const T* xs = x + m * p.K;
    w += n * p.ldw;
    const auto step = [&](int chain, int64_t k, auto... lanes) {
      Vec<T> tokens[kM];
#pragma GCC unroll 4
      for (int i = 0; i < kM; ++i) tokens[i] = load<T>(xs + i * p.K + k, lanes...);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        const Vec<T> row = load<T>(w + r * apart * p.ldw + k, lanes...);
#pragma GCC unroll 4
        for (int i = 0; i < kM; ++i) acc[chain][i][r] = fma(tokens[i], row, acc[chain][i][r]);
      }
    };
    int64_t k = 0;
    for (; k + kChains * kL <= p.K; k += kChains * kL)
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) step(c, k + c * kL);
    for (; k < p.K; k += kL) step(0, k, least<int64_t>(kL, p.K - k));
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) sums[(m + i) * N + n + r * apart] = reduce_add(acc[0][i][r] + acc[1][i][r]);
  }

  // The same for all tokens: four at a time where there are registers, as many chains for two as for one.
  template <int kR> void outputs(const W* w, int64_t n, int64_t apart, T* sums, int64_t N) const {
    constexpr int kPair = least(kR, 2), kMost = kMR > 4 ? 4 : 2;
    const auto tokens = [&]<int kM>(int64_t m) {
      for (int r = 0; r < kR; r += kPair) dot_products<kM, kPair>(w, m, n + r * apart, apart, sums, N);
    };
    int64_t m = 0;
    for (; m + kMost <= p.M; m += kMost) tokens.template operator()<kMost>(m);
    if (kMost > 2 && m + 2 <= p.M) tokens.template operator()<2>(m), m += 2;
    if (m < p.M) dot_products<1, kR>(w, m, n, apart, sums, N);
  }

  void by_rows() const {
    parallel(p.pool, ceil_div<int64_t>(p.N, kRows), grain(kRows * p.K), [&](int64_t first, int64_t last) {
      const int64_t begin = first * kRows, N = least(last * kRows, p.N) - begin, apart = N / kRows;
      T* sums = static_cast<T*>(thread_scratch(kScratchTile, size_t(p.M * N) * sizeof(T)));
      const W* w = weights(begin, 0);
      for (int64_t n = 0; n < apart; ++n) outputs<kRows>(w, n, apart, sums, N);
      for (int64_t n = kRows * apart; n < N; ++n) outputs<1>(w, n, 0, sums, N);
      finish(begin, N, sums, N, 1, 0);
    });
  }

  // ---- by columns ----

  // sums[m][n] += x[m][k] w[k][n] for kD rows k, k + apart ... and N columns.
  template <int kD> void add_rows(int64_t k, int64_t apart, int64_t begin, int64_t N, T* sums) const {
    const W* w = weights(k, begin);
    for_each_vector(N, [&](int64_t n, auto... lanes) {
      Vec<T> rows[kD];
#pragma GCC unroll 8
      for (int d = 0; d < kD; ++d) rows[d] = load<T>(w + d * apart * p.ldw + n, lanes...);
      for (int64_t m = 0; m < p.M; ++m) {
        Vec<T> sum = load<T>(sums + m * p.N + n, lanes...);
#pragma GCC unroll 8
        for (int d = 0; d < kD; ++d) sum = fma(splat(x[m * p.K + k + d * apart]), rows[d], sum);
        store(sums + m * p.N + n, sum, lanes...);
      }
    });
  }

  void by_columns() const {
    const int64_t parts = greatest<int64_t>(1, least(p.K / kPartRows, kMaxParts)), size = p.M * p.N;
    const int64_t strips = ceil_div(p.N, kStrip);
    T* sums = static_cast<T*>(thread_scratch(kScratchPack, size_t(parts * size) * sizeof(T)));  // (parts, M, N)
    parallel(p.pool, parts * strips, grain(p.K / parts * least(p.N, kStrip)), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t part = i / strips, begin = i % strips * kStrip, N = least(kStrip, p.N - begin);
        const int64_t from = p.K * part / parts, to = p.K * (part + 1) / parts, apart = (to - from) / kDepth;
        T* sum = sums + part * size + begin;
        for (int64_t m = 0; m < p.M; ++m)
          for_each_vector(N, [&](int64_t n, auto... lanes) { store(sum + m * p.N + n, Vec<T>{}, lanes...); });
        for (int64_t k = from; k < from + apart; ++k) add_rows<kDepth>(k, apart, begin, N, sum);
        for (int64_t k = from + kDepth * apart; k < to; ++k) add_rows<1>(k, 0, begin, N, sum);
      }
    });
    parallel(p.pool, strips, 1, [&](int64_t first, int64_t last) {
      finish(first * kStrip, least(last * kStrip, p.N) - first * kStrip, sums + first * kStrip, p.N, parts, size);
    });
  }
};

template <class S, class W, class Y> void few_tokens(const FewTokensParams& all) {
  using T = compute_t<S>;
  for (int64_t m = 0; m < all.M; m += kTokens) {
    FewTokensParams p = all;
    p.M = least(all.M - m, kTokens);
    p.y = static_cast<Y*>(all.y) + m * p.ldy;
    const S* given = static_cast<const S*>(all.x) + m * p.K;
    const T* x;
    if constexpr (sizeof(S) == sizeof(T)) {
      x = given;
    } else {
      T* wide = static_cast<T*>(thread_scratch(kScratchKernel, size_t(p.M * p.K) * sizeof(T)));
      FewTokens<S, W, Y>::for_each_vector(p.M * p.K, [&](int64_t i, auto... lanes) {
        store(wide + i, load<T>(given + i, lanes...), lanes...);
      });
      x = wide;
    }
    const FewTokens<S, W, Y> layer{p, x};
    if (p.by_columns) layer.by_columns();
    else layer.by_rows();
  }
}

}  // namespace fastlm::FASTLM_ISA
#endif
