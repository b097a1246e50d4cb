// Rows of storage elements as vectors, of which the last may be a part, and sums over rows.
#pragma once
#include "gemm.h"

namespace fastlm::FASTLM_ISA {

// Loads and stores of a vector of which the first w lanes are in use. In loops over whole vectors w is
// the constant kLanes, and the choice falls away.
template <class F, class S> FASTLM_INLINE Vec<F> get(const S* p, int64_t w) {
  return w == kLanes<F> ? load<F>(p) : load<F>(p, w);
}
template <class F, class S> FASTLM_INLINE void put(S* p, Vec<F> v, int64_t w) {
  if (w == kLanes<F>) store(p, v);
  else store(p, v, w);
}

// Vectors of a row between two offsets: f(offset, lanes in use).
template <class F, class Visit>
FASTLM_INLINE void each_vector(int64_t begin, int64_t end, const Visit& f) {
  int64_t i = begin;
  for (; i + kLanes<F> <= end; i += kLanes<F>) f(i, int64_t(kLanes<F>));
  if (i < end) f(i, end - i);
}

// sums[n] = sum over rows of a[row][n], or of a[row][n] * b[row][n] where b is given: in blocks of rows,
// so that the error grows with the root of the number of rows at most.
template <class S, class A>
void column_sums(const Pool& pool, int64_t rows, int64_t n, const A* a, int64_t lda,
                 const compute_t<S>* b, int64_t ldb, S* sums) {
  using F = compute_t<S>;
  constexpr int64_t kL = kLanes<F>, kRows = 64, kWide = 8;
  // Of kV vectors of columns from i on, w lanes of the last: rows lie far apart, and of each as much is read at a time
  // as there are registers for.
  const auto strip = [&]<int kV>(int64_t i, int64_t w) FASTLM_INLINED {
    Vec<F> total[kV] = {};
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      Vec<F> sum[kV] = {};
      for (int64_t r = r0; r < least(rows, r0 + kRows); ++r) {
        prefetch(kV * kL, a + (r + kAhead) * lda + i);
#pragma GCC unroll 8
        for (int x = 0; x < kV; ++x) {
          const int64_t at = i + x * kL;
          const Vec<F> v = get<F>(a + r * lda + at, w);
          sum[x] = b ? fma(v, get<F>(b + r * ldb + at, w), sum[x]) : sum[x] + v;
        }
      }
#pragma GCC unroll 8
      for (int x = 0; x < kV; ++x) total[x] += sum[x];
    }
#pragma GCC unroll 8
    for (int x = 0; x < kV; ++x) put<F>(sums + i + x * kL, total[x], w);
  };
  parallel(pool, ceil_div<int64_t>(n, kWide * kL), 1, [&](int64_t begin, int64_t end) {
    int64_t i = begin * kWide * kL;
    const int64_t last = least(n, end * kWide * kL);
    for (; i + kWide * kL <= last; i += kWide * kL) strip.template operator()<kWide>(i, kL);
    each_vector<F>(i, last, [&](int64_t j, int64_t w) { strip.template operator()<1>(j, w); });
  });
}

}  // namespace fastlm::FASTLM_ISA
