// CUDA's names that need no model, for a C++ compiler: qualifiers, vector types, mathematics, bit casts.
#pragma once
#include <math.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#define __global__ __attribute__((noinline, visibility("default")))  // a name that the counts can tell
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define SIMT_VECTORS(name, T)                                                                 \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                          \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };               \
  inline constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                        \
  inline constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTORS(int, int)
SIMT_VECTORS(uint, unsigned)
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
#undef SIMT_VECTORS

// In the kernels' namespace, where these names hide those that math.h keeps for itself.
namespace fastlm::cuda {

// ---- mathematics beyond that of math.h ----

#define SIMT_MIN_MAX(T)                                         \
  inline constexpr T min(T a, T b) { return b < a ? b : a; }    \
  inline constexpr T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
// As fmin and fmax: the other operand where one is NaN.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }

inline constexpr unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline constexpr int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline constexpr float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline constexpr float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline constexpr long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline constexpr double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
inline float __int2float_rn(int x) { return float(x); }

inline constexpr int __popc(unsigned x) { return std::popcount(x); }
inline constexpr int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline constexpr int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline constexpr unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

}  // namespace fastlm::cuda
