// Checks simd.h and gemm.h of one ISA against scalar arithmetic: every conversion, each partial load
// and store length with guard bytes behind it, exp/tanh against libm, matrix products of all tile
// remainders and layouts. The ISA is the one this file is compiled for. Exits with 1 on a failure.
#define FASTLM_ISA tested
#include "cpu/gemm.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "native.h"

using namespace fastlm;
using namespace fastlm::tested;

namespace {

int failures = 0;

void expect(bool ok, const char* what, double at) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s at %g\n", what, at);
}

template <class T> double ulps(T got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : 1e9;
  if (double(got) == double(T(want))) return 0;
  const double unit = std::nextafter(std::fabs(T(want)), std::numeric_limits<T>::infinity()) - std::fabs(T(want));
  return std::fabs(double(got) - want) / unit;
}

template <class T> void test_functions() {
  const double top = sizeof(T) == 4 ? 88.7 : 709.7, bottom = sizeof(T) == 4 ? -86.9 : -707.9;
  // Of float; fused multiply-adds, which not every instruction set and level of optimisation has, make it 1 and 1.4.
  const double exp_ulps = sizeof(T) == 4 ? 1.5 : 2, tanh_ulps = sizeof(T) == 4 ? 2 : 2.5;
  auto check = [&](double x) {
    const T t = T(x);
    expect(ulps<T>(exp(splat(t))[0], sizeof(T) == 4 ? std::exp(double(t)) : std::exp(t)) <= exp_ulps, "exp", x);
    expect(ulps<T>(tanh(splat(t))[0], sizeof(T) == 4 ? std::tanh(double(t)) : std::tanh(t)) <= tanh_ulps, "tanh", x);
  };
  const auto check_sigmoid = [&](double x) {
    const double want = 1 / (1 + std::exp(-double(T(x))));
    expect(ulps<T>(sigmoid(splat(T(x)))[0], want) <= 3, "sigmoid", x);
    if (x <= 0) expect(ulps<T>(exp_negative(splat(T(x)))[0], std::exp(double(T(x)))) <= exp_ulps, "exp_negative", x);
    const double rough = double(exp_negative<true>(splat(T(x)))[0]), exact = std::exp(double(T(x)));
    if (x <= 0)
      expect(std::fabs(rough - exact) <= 0x1p-19 * exact || (rough == 0 && x <= -86.6), "rough exp_negative", x);
  };
  for (int i = 0; i <= 20000; ++i) check(bottom + (top - bottom) * i / 20000);
  for (int i = 0; i <= 20000; ++i) check_sigmoid(bottom + (top - bottom) * i / 20000);
  for (int i = -4000; i <= 4000; ++i) check(i / 1999.0);
  if constexpr (sizeof(T) == 8) {
    for (int i = -20000; i <= 20000; ++i)
      for (double x : {1 + i / 40000.0, std::exp(i / 30.0), 1 + std::ldexp(1.0, -i / 400), std::sqrt(0.5) + i * 0x1p-52})
        expect(ulps<T>(log(splat(x))[0], std::log(x)) <= 2, "log", x);
    for (double x : {0.0, -0.0, -1.0, 0x1p-1060, std::numeric_limits<double>::infinity(), double(NAN)}) {
      Vec<double> some = splat(2.0);
      some[1] = x;
      const double got = log(some)[1], want = std::log(x);
      expect(log(some)[0] == log(splat(2.0))[0] && (got == want || (std::isnan(got) && std::isnan(want))), "log of", x);
    }
  }
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  expect(exp(splat(-inf))[0] == 0 && exp(splat(T(-1e30)))[0] == 0, "exp(-inf)", 0);
  expect(exp(splat(inf))[0] == inf && exp(splat(T(1e30)))[0] == inf, "exp(inf)", 0);
  expect(std::isnan(exp(splat(nan))[0]) && std::isnan(tanh(splat(nan))[0]), "NaN", 0);
  expect(tanh(splat(inf))[0] == 1 && tanh(splat(-inf))[0] == -1, "tanh(inf)", 0);
  expect(sigmoid(splat(-inf))[0] == 0 && sigmoid(splat(inf))[0] == 1, "sigmoid(inf)", 0);
  expect(std::isnan(sigmoid(splat(nan))[0]) && std::isnan(exp_negative(splat(nan))[0]), "NaN of a sigmoid", 0);
  expect(exp_negative(splat(-inf))[0] == 0 && exp_negative(splat(T(-1e30)))[0] == 0, "exp_negative(-inf)", 0);
  expect(exp_negative<true>(splat(-inf))[0] == 0 && std::isnan(exp_negative<true>(splat(nan))[0]), "rough exp_negative", 0);
  expect(std::signbit(tanh(splat(T(-0.)))[0]) && !std::signbit(tanh(splat(T(0)))[0]), "tanh(0)", 0);
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T((i * 7) % kLanes<T>);
  expect(reduce_max(v) == kLanes<T> - 1 && reduce_add(v) == kLanes<T> * (kLanes<T> - 1) / 2, "reduce", 0);
  expect(max(splat(T(1)), splat(T(2)))[0] == 2 && min(splat(T(1)), splat(T(2)))[0] == 1, "max", 0);
}

// bf16 and f16 are checked over all 65536 values; rounding over neighbours of the halfway points.
float f16_value(uint16_t h) {
  const int e = (h >> 10) & 31, m = h & 1023;
  const float s = h & 0x8000 ? -1.f : 1.f;
  if (e == 31) return m ? NAN : s * INFINITY;
  return s * (e ? std::ldexp(float(1024 + m), e - 25) : std::ldexp(float(m), -24));
}

void test_half() {
  for (uint32_t i = 0; i < 65536; ++i) {
    const bf16 b{uint16_t(i)};
    const f16 h{uint16_t(i)};
    const float fb = to_compute(b), fh = to_compute(h), wb = bits_of<float>(i << 16), wh = f16_value(uint16_t(i));
    expect(std::isnan(wb) ? std::isnan(fb) : bits_of<uint32_t>(fb) == bits_of<uint32_t>(wb), "bf16 load", i);
    expect(std::isnan(wh) ? std::isnan(fh) : bits_of<uint32_t>(fh) == bits_of<uint32_t>(wh), "f16 load", i);
    if (std::isnan(wb)) expect(std::isnan(to_compute(from_compute<bf16>(wb))), "bf16 NaN", i);
    else if ((i & 0x7f80) != 0) expect(from_compute<bf16>(fb).bits == i, "bf16 store", i);
    if (std::isnan(wh)) expect(std::isnan(to_compute(from_compute<f16>(wh))), "f16 NaN", i);
    else expect(from_compute<f16>(fh).bits == i, "f16 store", i);
  }
  for (uint32_t i = 0; i < 31744; ++i) {  // halfway between f16 neighbours: to even
    const float low = f16_value(uint16_t(i)), high = i + 1 < 31744 ? f16_value(uint16_t(i + 1)) : 65536.f;
    expect(from_compute<f16>((low + high) / 2).bits == (i & 1 ? i + 1 : i), "f16 tie", i);
  }
  for (uint32_t i = 0x80; i < 0x7f7f; ++i) {
    const float tie = bits_of<float>((i << 16) | 0x8000u);
    expect(from_compute<bf16>(tie).bits == (i & 1 ? i + 1 : i), "bf16 tie", i);
    expect(from_compute<bf16>(std::nextafter(tie, INFINITY)).bits == i + 1, "bf16 up", i);
  }
}

template <class S> void test_partial() {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  for (int n = 0; n <= kL; ++n) {
    // Heap blocks of exactly n elements: the address sanitizer sees a touch behind them.
    std::vector<S> from(n), to(n);
    for (int i = 0; i < n; ++i) from[i] = from_compute<S>(T(i + 1));
    const Vec<T> v = load<T>(from.data(), n);
    for (int i = 0; i < kL; ++i) expect(v[i] == (i < n ? T(i + 1) : T(0)), "partial load", n);
    store(to.data(), v, n);
    expect(n == 0 || !std::memcmp(from.data(), to.data(), n * sizeof(S)), "partial store", n);
  }
}

void test_dot2() {
  for (int i = 0; i < 1000; ++i) {
    auto r = [] { return from_compute<bf16>(float(std::rand() % 2001 - 1000) / 64); };
    const bf16 a0 = r(), a1 = r(), b0 = r(), b1 = r();
    const float got = dot2(splat(1.f), splat<uint32_t>(a0.bits | uint32_t(a1.bits) << 16),
                           splat<uint32_t>(b0.bits | uint32_t(b1.bits) << 16))[kLanes<float> - 1];
    const double want = 1 + double(to_compute(a0)) * to_compute(b0) + double(to_compute(a1)) * to_compute(b1);
    expect(std::fabs(got - want) <= 1e-6 * (1 + 500), "dot2", i);
    const Words p = pair_bf16(splat(to_compute(a0)), splat(to_compute(a1)));
    expect(p[0] == (a0.bits | uint32_t(a1.bits) << 16), "pair_bf16", i);
  }
  // Every lane to its place.
  constexpr int kL = kLanes<float>;
  const Vec<float> even = iota<float>(), odd = even + splat(64.f);
  bf16 rows[2][kL];
  const Words stored = store_pair(rows[0], rows[1], even, odd), paired = pair_bf16(even, odd);
  const Words read = interleave(load_raw<Half>(rows[0]), load_raw<Half>(rows[1]));
  for (int i = 0; i < kL; ++i) {
    expect(to_compute(rows[0][i]) == even[i] && to_compute(rows[1][i]) == odd[i], "store_pair, rows", i);
    const uint32_t want = rows[0][i].bits | uint32_t(rows[1][i].bits) << 16;
    expect(stored[i] == want && paired[i] == want && read[i] == want, "pairs", i);
  }
}

// Blocks as wide as any number of tiles leaves a rest of.
void test_matmul() {
  constexpr int kL = kLanes<float>, K = 5, M = kMR + 3;
  for (int N = kL; N <= 8 * kL; N += kL) {
    std::vector<float> a(M * K), b(K * N), c(M * N, 1.f);
    for (int i = 0; i < M * K; ++i) a[i] = float(i % 7 - 3);
    for (int i = 0; i < K * N; ++i) b[i] = float(i % 11 - 5);
    matmul<Float<float>, kRowMajor, kAccumulate>(M, N, K, a.data(), K, b.data(), N, c.data(), N);
    for (int i = 0; i < M * N; ++i) {
      float want = 1;
      for (int k = 0; k < K; ++k) want += a[i / N * K + k] * b[k * N + i % N];
      expect(c[i] == want, "matmul", N);
    }
  }
}

template <class S> void test_gemm(int M, int N, int K, bool ta, bool tb) {
  using T = compute_t<S>;
  std::vector<S> a(size_t(M) * K), b(size_t(K) * N), c(size_t(M) * N);
  std::vector<T> bias(N);
  auto r = [] { return T(std::rand() % 17 - 8) / 8; };
  for (auto& x : a) x = from_compute<S>(r());
  for (auto& x : b) x = from_compute<S>(r());
  for (auto& x : c) x = from_compute<S>(r());
  for (auto& x : bias) x = r();
  const std::vector<S> before = c;
  const int64_t am = ta ? 1 : K, ak = ta ? M : 1, bk = tb ? 1 : N, bn = tb ? K : 1;
  gemm(test_pool(3), Gemm<S, S, S>{M, N, K, a.data(), am, ak, b.data(), bk, bn, c.data(), N, bias.data(), true});
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double want = double(to_compute(before[m * N + n])) + bias[n], size = 1;
      for (int k = 0; k < K; ++k) {
        const double x = double(to_compute(a[m * am + k * ak])) * to_compute(b[k * bk + n * bn]);
        want += x, size += std::fabs(x);
      }
      const double unit = sizeof(S) == 2 ? 1.0 / 128 : sizeof(S) == 4 ? 1e-6 : 1e-14;
      expect(std::fabs(double(to_compute(c[m * N + n])) - want) <= unit * (size + std::fabs(want)), "gemm", m * N + n);
    }
}

}  // namespace

int main() {
  test_functions<float>();
  test_functions<double>();
  test_half();
  test_partial<double>();
  test_partial<float>();
  test_partial<bf16>();
  test_partial<f16>();
  test_dot2();
  test_matmul();
  for (int layout = 0; layout < 4; ++layout) {
    for (int M : {1, 2, 3, 7, 13})
      for (int N : {1, kLanes<float> - 1, kLanes<float> + 1, 3 * kLanes<float>, 5 * kLanes<float> + 2})
        for (int K : {1, 5, 67}) test_gemm<float>(M, N, K, layout & 1, layout & 2);
    test_gemm<double>(203, 2 * kLanes<double> + 1, 300, layout & 1, layout & 2);
    test_gemm<float>(197, 170, 530, layout & 1, layout & 2);
    test_gemm<bf16>(65, 100, 131, layout & 1, layout & 2);
    test_gemm<f16>(65, 33, 131, layout & 1, layout & 2);
  }
  test_gemm<float>(4, 7, 0, false, false);
  std::printf("%s\n", failures ? "simd_test: FAILED" : "simd_test: ok");
  return failures != 0;
}
