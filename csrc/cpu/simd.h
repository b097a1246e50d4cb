// Vectors of one ISA behind one set of functions. A vector is a GCC/Clang vector extension type:
// + - * / < and `mask ? a : b` are the language's own, and the compiler lowers them to the ISA that
// the translation unit is compiled for; intrinsics stand here only where the extension has no word
// for the instruction. Everything lives in the namespace of the ISA (see kernels.h for the reason).
//
// T  compute type (float or double)      Vec<T>  kLanes<T> of them
// S  storage type (double, float, bf16, f16); compute_t<S> is double for double, else float
//
// exp and tanh follow Cephes (S. Moshier): Cody-Waite reduction and a polynomial or rational approximation. exp is
// within 1 ulp, tanh within 1.4, sigmoid within 3, where multiply-adds are fused.
#pragma once
#include <utility>

#include "kernels.h"

#if defined(FASTLM_AVX512_MODEL)
#include "avx512_model.h"
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTLM_INLINE inline __attribute__((always_inline))
// Of a lambda, behind its parameters: one that is called for whole vectors and for a rest is else compiled once
// for both, and reads what it captures from memory again behind every store.
#define FASTLM_INLINED __attribute__((always_inline))

namespace fastlm::FASTLM_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512BF16__)
inline constexpr bool kHasBf16Dot = true;
#else
inline constexpr bool kHasBf16Dot = false;
#endif
// Vector registers: 32 with AVX-512 and NEON, 16 otherwise.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kMR = 8;
#else
inline constexpr int kMR = 4;
#endif

template <class T> inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T> concept Number = __is_same(T, float) || __is_same(T, double) || __is_same(T, int8_t) ||
    __is_same(T, uint16_t) || __is_same(T, int32_t) || __is_same(T, uint32_t) || __is_same(T, int64_t) ||
    __is_same(T, uint64_t);
template <class T, int kBytes> struct VectorOf {};
template <Number T, int kBytes> struct VectorOf<T, kBytes> {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T> using Vec = typename VectorOf<T, kVectorBytes>::type;
using Half = VectorOf<uint16_t, kVectorBytes / 2>::type;  // storage of kLanes<float> 16-bit values
using Words = Vec<uint32_t>;                              // pairs of bf16, even k in the low half

template <class S> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
template <class S> using compute_t = typename Compute<S>::type;

template <class V> struct Element;
template <> struct Element<Vec<float>> { using type = float; using mask = Vec<int32_t>; };
template <> struct Element<Vec<double>> { using type = double; using mask = Vec<int64_t>; };
template <> struct Element<Words> { using type = uint32_t; using mask = Vec<int32_t>; };
template <class V> using element_t = typename Element<V>::type;
template <class V> using mask_t = typename Element<V>::mask;
template <class V> inline constexpr int kLanesOf = kLanes<element_t<V>>;

template <class T> FASTLM_INLINE constexpr T least(T a, T b) { return b < a ? b : a; }
template <class T> FASTLM_INLINE constexpr T greatest(T a, T b) { return a < b ? b : a; }
template <class T> FASTLM_INLINE constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }
template <class T> FASTLM_INLINE constexpr T round_up(T a, T b) { return ceil_div(a, b) * b; }

template <class To, class From> FASTLM_INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// ---- loads, stores, broadcasts ----

template <class T> FASTLM_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }  // x - 0 is x, -0 too
template <> FASTLM_INLINE Words splat(uint32_t x) { return x + Words{}; }

template <class T> FASTLM_INLINE Vec<T> iota() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}

// Lanes 0..n-1 true.
FASTLM_INLINE Vec<int32_t> first_lanes(int64_t n, float) { return iota<int32_t>() < (int32_t(n) - Vec<int32_t>{}); }
FASTLM_INLINE Vec<int64_t> first_lanes(int64_t n, double) { return iota<int64_t>() < (n - Vec<int64_t>{}); }
template <class T> FASTLM_INLINE mask_t<Vec<T>> first_lanes(int64_t n) { return first_lanes(n, T()); }

template <class V> FASTLM_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FASTLM_INLINE Half load_half(const void* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return Half(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
#else
  Half h{};
  for (int64_t i = 0; i < n; ++i) h[i] = static_cast<const uint16_t*>(p)[i];
  return h;
#endif
}

FASTLM_INLINE void store_half(void* p, Half h, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), __m256i(h));
#else
  for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = h[i];
#endif
}

// By name: for a conversion of vectors g++ 12 shuffles halves, up to seven instructions for one.
FASTLM_INLINE Words widen(Half h) {
#if defined(__AVX512F__)
  return Words(_mm512_cvtepu16_epi32(__m256i(h)));
#elif defined(__AVX2__)
  return Words(_mm256_cvtepu16_epi32(__m128i(h)));
#else
  return __builtin_convertvector(h, Words);
#endif
}
FASTLM_INLINE Half narrow(Words w) {  // of words below 2^16
#if defined(__AVX512F__)
  return Half(_mm512_cvtepi32_epi16(__m512i(w)));
#elif defined(__AVX2__)
  const __m256i twice = _mm256_packus_epi32(__m256i(w), __m256i(w));
  return Half(_mm256_castsi256_si128(_mm256_permute4x64_epi64(twice, 0x08)));
#else
  return __builtin_convertvector(w, Half);
#endif
}

FASTLM_INLINE Vec<float> widen_bf16(Half h) {
#if defined(__AVX512BW__)  // one instruction where widening and shifting are two, of which Zen 4 is short
  const __m512i place = __m512i(iota<uint32_t>() << 16);
  return bits_of<Vec<float>>(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, _mm512_castsi256_si512(__m256i(h))));
#else
  return bits_of<Vec<float>>(widen(h) << 16);
#endif
}

// Rounded to nearest even; a NaN stays a NaN.
FASTLM_INLINE Half narrow_bf16(Vec<float> x) {
#if defined(__AVX512BF16__)
  return bits_of<Half>(_mm512_cvtneps_pbh(__m512(x)));
#else
  const Words u = bits_of<Words>(x);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words quiet = (u >> 16) | 0x40u;
  return narrow((x == x) ? rounded : quiet);
#endif
}

FASTLM_INLINE Vec<float> widen_f16(Half h) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtph_ps(__m256i(h)));
#elif defined(__F16C__)
  return Vec<float>(_mm256_cvtph_ps(__m128i(h)));
#elif defined(__aarch64__)
  return Vec<float>(vcvt_f32_f16(vreinterpret_f16_u16(uint16x4_t(h))));
#else
  const Words w = widen(h);
  const Words magnitude = (w & 0x7fffu) << 13;
  const Vec<float> finite = bits_of<Vec<float>>(magnitude) * splat(0x1p112f);  // subnormals too
  const Words special = magnitude | 0x7f800000u;                               // inf and NaN
  const Words result = ((w & 0x7c00u) == 0x7c00u) ? special : bits_of<Words>(finite);
  return bits_of<Vec<float>>(result | ((w & 0x8000u) << 16));
#endif
}

FASTLM_INLINE Half narrow_f16(Vec<float> x) {
#if defined(__AVX512F__)
  return Half(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return Half(_mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  return Half(vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(x))));
#else
  const Words u = bits_of<Words>(x), sign = u & 0x80000000u, a = u ^ sign;
  const Words special = (a > 0x7f800000u) ? (Words{} + 0x7e00u) : (Words{} + 0x7c00u);
  const Words normal = (a + 0xc8000fffu + ((a >> 13) & 1u)) >> 13;
  const Words subnormal = bits_of<Words>(bits_of<Vec<float>>(a) + splat(0.5f)) - 0x3f000000u;
  const Words small = (a < 0x38800000u) ? subnormal : normal;
  const Words magnitude = (a >= 0x47800000u) ? special : small;
  return narrow(magnitude | (sign >> 16));
#endif
}

template <class T> FASTLM_INLINE Vec<T> load(const T* p) { return load_raw<Vec<T>>(p); }
template <class T> FASTLM_INLINE Vec<T> load(const bf16* p) { return widen_bf16(load_raw<Half>(p)); }
template <class T> FASTLM_INLINE Vec<T> load(const f16* p) { return widen_f16(load_raw<Half>(p)); }

// Weights of 8 bits. By name, as widen() is.
template <class T> FASTLM_INLINE Vec<T> load(const int8_t* p) {
  using Bytes = typename VectorOf<int8_t, kLanes<T>>::type;
  const Bytes b = load_raw<Bytes>(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Vec<T>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(__m128i(b))));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#endif
  return __builtin_convertvector(b, Vec<T>);
}

template <class T> FASTLM_INLINE void store(T* p, Vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }
FASTLM_INLINE void store(bf16* p, Vec<float> v) {
  const Half h = narrow_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
FASTLM_INLINE void store(f16* p, Vec<float> v) {
  const Half h = narrow_f16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// A store past the caches, for results larger than these, of a whole vector to which p is aligned.
// stream_end() stands between the last of them and whatever tells another thread.
FASTLM_INLINE void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <class V> FASTLM_INLINE void stream_bytes(void* p, V v) {
  static_assert(sizeof v == kVectorBytes);
#if defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<V*>(p));
#elif defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), bits_of<__m512i>(v));
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(p), bits_of<__m256i>(v));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), bits_of<__m128i>(v));
#else
  __builtin_memcpy(p, &v, sizeof v);
#endif
}
template <class T> FASTLM_INLINE void stream(T* p, Vec<T> v) { stream_bytes(p, v); }
// Two vectors that are one in memory: of 32 bytes at a time, lines took half as long again (Zen 4).
FASTLM_INLINE void stream(f16* p, Vec<float> first, Vec<float> second) {
  const Half both[2] = {narrow_f16(first), narrow_f16(second)};
  stream_bytes(p, load_raw<Words>(both));
}
FASTLM_INLINE void stream(bf16* p, Vec<float> first, Vec<float> second) {
#if defined(__AVX512BF16__)
  stream_bytes(p, bits_of<Words>(_mm512_cvtne2ps_pbh(__m512(second), __m512(first))));
#else
  const Half both[2] = {narrow_bf16(first), narrow_bf16(second)};
  stream_bytes(p, load_raw<Words>(both));
#endif
}

// The first n lanes (0 <= n <= lanes); the others are 0, and memory behind them is not touched.
template <class T> FASTLM_INLINE Vec<T> load(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  else
    return Vec<T>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>(_mm256_maskload_ps(p, __m256i(first_lanes<T>(n))));
  else
    return Vec<T>(_mm256_maskload_pd(p, __m256i(first_lanes<T>(n))));
#else
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
template <class T> FASTLM_INLINE Vec<T> load(const bf16* p, int64_t n) {
  return widen_bf16(load_half(p, n));
}
template <class T> FASTLM_INLINE Vec<T> load(const f16* p, int64_t n) {
  return widen_f16(load_half(p, n));
}
template <class T> FASTLM_INLINE Vec<T> load(const int8_t* p, int64_t n) {
  int8_t bytes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return load<T>(bytes);
}
template <class T> FASTLM_INLINE void store(T* p, Vec<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), __m512d(v));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    _mm256_maskstore_ps(p, __m256i(first_lanes<T>(n)), __m256(v));
  else
    _mm256_maskstore_pd(p, __m256i(first_lanes<T>(n)), __m256d(v));
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}
FASTLM_INLINE void store(bf16* p, Vec<float> v, int64_t n) { store_half(p, narrow_bf16(v), n); }
FASTLM_INLINE void store(f16* p, Vec<float> v, int64_t n) { store_half(p, narrow_f16(v), n); }

// Scalars of any storage type; the 16-bit ones go through lane 0, so that they round alike.
FASTLM_INLINE double to_compute(double x) { return x; }
FASTLM_INLINE float to_compute(float x) { return x; }
FASTLM_INLINE float to_compute(bf16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }
FASTLM_INLINE float to_compute(f16 x) { return load<float>(&x, 1)[0]; }
template <class S> FASTLM_INLINE S from_compute(compute_t<S> x) {
  S y;
  store(&y, splat(x), 1);
  return y;
}

// ---- arithmetic ----

// Contracted to one instruction where the ISA has it (-ffp-contract=fast).
template <class V> FASTLM_INLINE V fma(V a, V b, V c) { return a * b + c; }

template <class V> FASTLM_INLINE V select(mask_t<V> m, V a, V b) { return m ? a : b; }

// Of two operands of which one is NaN, the second is returned, as maxps does.
template <class V> FASTLM_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(element_t<V>) == 4) return V(_mm512_max_ps(__m512(a), __m512(b)));
  else return V(_mm512_max_pd(__m512d(a), __m512d(b)));
#elif defined(__AVX2__)
  if constexpr (sizeof(element_t<V>) == 4) return V(_mm256_max_ps(__m256(a), __m256(b)));
  else return V(_mm256_max_pd(__m256d(a), __m256d(b)));
#else
  return a > b ? a : b;
#endif
}
template <class V> FASTLM_INLINE V min(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(element_t<V>) == 4) return V(_mm512_min_ps(__m512(a), __m512(b)));
  else return V(_mm512_min_pd(__m512d(a), __m512d(b)));
#elif defined(__AVX2__)
  if constexpr (sizeof(element_t<V>) == 4) return V(_mm256_min_ps(__m256(a), __m256(b)));
  else return V(_mm256_min_pd(__m256d(a), __m256d(b)));
#else
  return a < b ? a : b;
#endif
}

// The bit of the sign in every lane; |a|; -|a|; |a| with the sign of b.
template <class V> FASTLM_INLINE mask_t<V> sign_bits() { return bits_of<mask_t<V>>(splat(element_t<V>(-0.))); }
template <class V> FASTLM_INLINE V abs(V a) { return bits_of<V>(bits_of<mask_t<V>>(a) & ~sign_bits<V>()); }
template <class V> FASTLM_INLINE V minus_abs(V a) { return bits_of<V>(bits_of<mask_t<V>>(a) | sign_bits<V>()); }
template <class V> FASTLM_INLINE V copy_sign(V a, V b) {
  return bits_of<V>((bits_of<mask_t<V>>(a) & ~sign_bits<V>()) | (bits_of<mask_t<V>>(b) & sign_bits<V>()));
}

// a / b within 1 ulp, b and 1 / b normal numbers. A division of 16 lanes takes the place of 30 multiplications.
FASTLM_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const Vec<float> inverse = Vec<float>(_mm512_rcp14_ps(__m512(b))), q = a * inverse;
  return fma(q, splat(1.f) - b * inverse, q);
#else
  return a / b;
#endif
}
FASTLM_INLINE Vec<double> quotient(Vec<double> a, Vec<double> b) { return a / b; }

// acc + a.lo * b.lo + a.hi * b.hi over pairs of bf16.
FASTLM_INLINE Vec<float> dot2(Vec<float> acc, Words a, Words b) {
#if defined(__AVX512BF16__)
  return Vec<float>(_mm512_dpbf16_ps(__m512(acc), bits_of<__m512bh>(a), bits_of<__m512bh>(b)));
#else
  const Words high = Words{} + 0xffff0000u;
  acc = fma(bits_of<Vec<float>>(a & high), bits_of<Vec<float>>(b & high), acc);
  return fma(bits_of<Vec<float>>(a << 16), bits_of<Vec<float>>(b << 16), acc);
#endif
}

// The halves of each word: one vector's in the low ones, another's in the high ones.
#if defined(__AVX512BW__)
FASTLM_INLINE Words interleave(Words both) {  // the low ones' vector is the first half of `both`
  const Words lane = iota<uint32_t>();
  return Words(_mm512_permutexvar_epi16(__m512i(lane | ((lane + 16u) << 16)), __m512i(both)));
}
FASTLM_INLINE Words interleave(Half low, Half high) {
  return interleave(Words(_mm512_inserti64x4(_mm512_castsi256_si512(__m256i(low)), __m256i(high), 1)));
}
#else
FASTLM_INLINE Words interleave(Half low, Half high) { return widen(low) | (widen(high) << 16); }
#endif

// Two vectors rounded to bf16 and paired lane by lane: `even` in the low halves. store_pair also stores them,
// each to a row of its own.
#if defined(__AVX512BF16__)
FASTLM_INLINE Words round_both(Vec<float> even, Vec<float> odd) {
  return bits_of<Words>(_mm512_cvtne2ps_pbh(__m512(odd), __m512(even)));
}
FASTLM_INLINE Words pair_bf16(Vec<float> even, Vec<float> odd) { return interleave(round_both(even, odd)); }
FASTLM_INLINE Words store_pair(bf16* even_row, bf16* odd_row, Vec<float> even, Vec<float> odd) {
  const Words both = round_both(even, odd);
  const __m256i low = _mm512_castsi512_si256(__m512i(both)), high = _mm512_extracti64x4_epi64(__m512i(both), 1);
  __builtin_memcpy(even_row, &low, sizeof low);
  __builtin_memcpy(odd_row, &high, sizeof high);
  return interleave(both);
}
#else
FASTLM_INLINE Words pair_bf16(Vec<float> even, Vec<float> odd) {
  return interleave(narrow_bf16(even), narrow_bf16(odd));
}
FASTLM_INLINE Words store_pair(bf16* even_row, bf16* odd_row, Vec<float> even, Vec<float> odd) {
  store(even_row, even);
  store(odd_row, odd);
  return pair_bf16(even, odd);
}
#endif

// ---- reductions over lanes, in a fixed order (halves folded onto halves) ----

// Down to 16 bytes in vectors: a loop over lanes in memory stays a loop where lanes are 16.
template <class T, class V, class Op> FASTLM_INLINE auto fold_to_16_bytes(V v, Op op) {
  if constexpr (sizeof(V) > 16) {
    typename VectorOf<T, sizeof(V) / 2>::type half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return fold_to_16_bytes<T>(op(half[0], half[1]), op);
  } else {
    return v;
  }
}
template <class T, class V, class Op> FASTLM_INLINE T fold(V v, Op op) {
  const auto x = fold_to_16_bytes<T>(v, op);
  if constexpr (sizeof(T) == 4) return op(op(T(x[0]), T(x[2])), op(T(x[1]), T(x[3])));
  else return op(T(x[0]), T(x[1]));
}
template <class V> FASTLM_INLINE element_t<V> reduce_add(V v) {
  return fold<element_t<V>>(v, [](auto a, auto b) { return a + b; });
}
template <class V> FASTLM_INLINE element_t<V> reduce_max(V v) {
  return fold<element_t<V>>(v, [](auto a, auto b) { return a > b ? a : b; });
}

using Quad = VectorOf<uint32_t, 16>::type;

// Lane l of the result is lane at(l) of a, or at(l) - lanes of b. `at` captures nothing.
template <class V, class At> FASTLM_INLINE V shuffle(V a, V b, At) {
  return [&]<int... l>(std::integer_sequence<int, l...>) FASTLM_INLINED {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, At{}(l)...);
#else
    return __builtin_shuffle(a, b, V{uint32_t(At{}(l))...});
#endif
  }(std::make_integer_sequence<int, int(sizeof(V) / 4)>{});
}

// kSide rows of kSide lanes become their columns: first the squares of four within 16 bytes, then these.
template <int kSide, class V> FASTLM_INLINE void transpose_square(V (&r)[kSide]) {
  static_assert(sizeof(V) == 4 * kSide);
#pragma GCC unroll 4
  for (int i = 0; i < kSide; i += 4) {
    const auto low = [](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * kSide; };
    const auto high = [](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * kSide + 2; };
    const V t0 = shuffle(r[i], r[i + 1], low), t1 = shuffle(r[i + 2], r[i + 3], low);
    const V t2 = shuffle(r[i], r[i + 1], high), t3 = shuffle(r[i + 2], r[i + 3], high);
    const auto first = [](int l) { return l / 4 * 4 + l % 2 + l % 4 / 2 * kSide; };
    const auto second = [](int l) { return l / 4 * 4 + l % 2 + l % 4 / 2 * kSide + 2; };
    r[i] = shuffle(t0, t1, first), r[i + 1] = shuffle(t0, t1, second);
    r[i + 2] = shuffle(t2, t3, first), r[i + 3] = shuffle(t2, t3, second);
  }
#pragma GCC unroll 2
  for (int d = 4; d < kSide; d *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < kSide / 2; ++i) {
      V &a = r[i / d * 2 * d + i % d], &b = r[i / d * 2 * d + i % d + d];
      const V even = shuffle(a, b, [](int l) { return l / 4 * 8 + l % 4; });
      b = shuffle(a, b, [](int l) { return l / 4 * 8 + l % 4 + 4; });
      a = even;
    }
}

// sums[i] = reduce_add(v[i]) for a vector's worth of vectors, four at once where lanes are floats.
FASTLM_INLINE void reduce_add_each(const Vec<float>* v, float* sums) {
  using V = VectorOf<float, 16>::type;
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<float>; i += 4) {
    Quad x[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      x[j] = bits_of<Quad>(fold_to_16_bytes<float>(v[i + j], [](auto a, auto b) { return a + b; }));
    transpose_square<4>(x);
    const V sum = (bits_of<V>(x[0]) + bits_of<V>(x[2])) + (bits_of<V>(x[1]) + bits_of<V>(x[3]));
    __builtin_memcpy(sums + i, &sum, sizeof sum);
  }
}
FASTLM_INLINE void reduce_add_each(const Vec<double>* v, double* sums) {
  for (int i = 0; i < kLanes<double>; ++i) sums[i] = reduce_add(v[i]);
}

// ---- transcendental functions ----

// p * 2^n for integral n held in floating point, |n| within the exponent range; below it, 0.
FASTLM_INLINE Vec<float> scale2(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  const Vec<int32_t> e = bits_of<Vec<int32_t>>(n + splat(12582912.f)) - 0x4b400000;  // 1.5 * 2^23
  return p * bits_of<Vec<float>>((e + 126) << 23) * splat(2.f);
#endif
}
FASTLM_INLINE Vec<double> scale2(Vec<double> p, Vec<double> n) {
#if defined(__AVX512F__)
  return Vec<double>(_mm512_scalef_pd(__m512d(p), __m512d(n)));
#else
  const Vec<int64_t> e =
      bits_of<Vec<int64_t>>(n + splat(6755399441055744.)) - 0x4338000000000000;  // 1.5 * 2^52
  return p * bits_of<Vec<double>>((e + 1022) << 52) * splat(2.);
#endif
}

// x - n log 2, for the integral n nearest to x / log 2.
FASTLM_INLINE Vec<float> exp_rest(Vec<float> x, Vec<float> n) {
  return fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
}
// (exp(x) - 1 - x) / x^2 for |x| <= log(2) / 2: a minimax polynomial, 1.4e-8 of exp(x) / x from it. Rough: 1.1e-7.
template <bool kRough = false> FASTLM_INLINE Vec<float> exp_curve(Vec<float> x) {
  if constexpr (kRough) {
    const Vec<float> p = fma(splat(8.3125e-3f), x, splat(4.189033e-2f));
    return fma(fma(p, x, splat(1.6667116e-1f)), x, splat(0.4999923f));
  }
  Vec<float> p = splat(1.394065563e-3f);
  p = fma(p, x, splat(8.366405964e-3f));
  p = fma(p, x, splat(4.166640341e-2f));
  p = fma(p, x, splat(1.666654497e-1f));
  return fma(p, x, splat(0.5f));
}
template <bool kRough = false> FASTLM_INLINE Vec<float> exp_of_rest(Vec<float> x) {
  return fma(fma(exp_curve<kRough>(x), x, splat(1.f)), x, splat(1.f));
}

// Results below the smallest normal number are 0; NaN stays NaN.
FASTLM_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x = max(splat(-87.33f), min(splat(89.f), x));  // constants first: a NaN in x comes through
  const V magic = splat(12582912.f);
  const V n = fma(x, splat(1.44269504f), magic) - magic;
  const V y = scale2(exp_of_rest(exp_rest(x, n)), n);
  const V big = (x > splat(88.7228f)) ? splat(__builtin_inff()) : y;
  return (x <= splat(-87.33f)) ? V{} : big;
}
FASTLM_INLINE Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  x = max(splat(-708.39), min(splat(710.), x));
  const V magic = splat(6755399441055744.);
  const V n = fma(x, splat(1.4426950408889634), magic) - magic;
  const V r = fma(n, splat(-1.42860682030941723212e-6), fma(n, splat(-6.93145751953125e-1), x));
  const V z = r * r;
  V p = fma(splat(1.26177193074810590878e-4), z, splat(3.02994407707441961300e-2));
  p = r * fma(p, z, splat(9.99999999999999999910e-1));
  V q = fma(splat(3.00198505138664455042e-6), z, splat(2.52448340349684104192e-3));
  q = fma(q, z, splat(2.27265548208155028766e-1));
  q = fma(q, z, splat(2.));
  const V y = scale2(fma(splat(2.), p / (q - p), splat(1.)), n);
  const V big = (x > splat(709.782712893384)) ? splat(__builtin_inf()) : y;
  return (x <= splat(-708.39)) ? V{} : big;
}

// x = n log 2 + rest for an n from -127 to 127, and 2^n; 0 for -127.
struct Reduced { Vec<float> rest, power; };
FASTLM_INLINE Reduced reduce(Vec<float> x) {
  const Vec<float> magic = splat(12582912.f + 127.f);  // 1.5 * 2^23: the low bits hold n + 127
  const Vec<float> biased = fma(x, splat(1.44269504f), magic);
  return {exp_rest(x, biased - magic), bits_of<Vec<float>>(bits_of<Words>(biased) << 23)};
}

#if defined(__AVX512F__)
// 2^n times the j-th of 16 numbers, where the low bits of shifted, made by adding 1.5 * 2^19, hold 16 n + j. Of each
// number the bits, less j << 19, which n << 23 brings with it.
FASTLM_INLINE Vec<float> power_of(Vec<float> shifted, Words numbers) {
  const Words at = bits_of<Words>(shifted);
  return bits_of<Vec<float>>(Words(_mm512_permutexvar_epi32(__m512i(at), __m512i(numbers))) + (at << 19));
}

// exp within 2^-19, by 9 instructions: x = (n + j / 16) log 2 + rest, and a square in the rest is a (t t + w) with
// t = rest + 23 / 16 log 2, where half of it would be (rest + 1)^2 + 1. The powers a 2^(j/16) are in a register.
FASTLM_INLINE Vec<float> exp_rough(Vec<float> x) {
  const Words powers = {
      0x3f0078e0, 0x3efe28fd, 0x3efc1993, 0x3efa4d7a, 0x3ef8c7af, 0x3ef78b4e, 0x3ef69b98, 0x3ef5fbf1,
      0x3ef5afe5, 0x3ef5bb27, 0x3ef62194, 0x3ef6e737, 0x3ef81046, 0x3ef9a128, 0x3efb9e76, 0x3efe0cfd};
  const Vec<float> shifted = fma(x, splat(1.44269504f), splat(786432.f));
  const Vec<float> steps = shifted - splat(786432.f + 1.4375f);
  // By name: rounded before the sum, the product would be 15 times as far off.
  const Vec<float> t = Vec<float>(_mm512_fnmadd_ps(__m512(steps), __m512(splat(0.693147181f)), __m512(x)));
  const Vec<float> curve = fma(t, t, splat(0.999838352f));  // exp_rough(0) is 1
  return (x <= splat(-86.6f)) ? Vec<float>{} : curve * power_of(shifted, powers);  // 0 below the normal numbers
}
#endif

// For x up to 88, as a softmax takes it, whose x are mostly below 0: without the checks of exp. 0 from about -88 on,
// some number below the normal ones shortly before, 0 too where it is rough; NaN stays NaN. Rough: within 2^-19, for what
// is rounded to 16 bits.
template <bool kRough = false> FASTLM_INLINE Vec<float> exp_negative(Vec<float> x) {
#if defined(__AVX512F__)
  if constexpr (kRough) return exp_rough(x);
  x = max(splat(-88.0296919f), x);  // -127 log 2
  // As in exp_rough; a cubic in the rest is 1.6e-9 from exp.
  const Words powers = {
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const Vec<float> magic = splat(786432.f);
  const Vec<float> shifted = fma(x, splat(1.44269504f), magic);
  const Vec<float> rest = exp_rest(x, shifted - magic);
  const Vec<float> power = power_of(shifted, powers);
  const Vec<float> curve = fma(fma(rest, splat(0.16667026f), splat(0.5000162f)), rest, splat(1.f));
  return fma(power, curve * rest, power);
#else
  const auto [r, power] = reduce(max(splat(-88.0296919f), x));
  return exp_of_rest<kRough>(r) * power;
#endif
}
template <bool kRough = false> FASTLM_INLINE Vec<double> exp_negative(Vec<double> x) { return exp(x); }

template <class V> FASTLM_INLINE V sigmoid(V x) {
  const V one = splat(element_t<V>(1)), e = exp_negative(minus_abs(x));
  return quotient((x < V{}) ? e : one, one + e);
}

FASTLM_INLINE Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V z = x * x, one = splat(1.f);
  V p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const V near = fma(p * z, x, x);
  const V twice = abs(x + x);
  const auto [r, power] = reduce(min(splat(20.f), twice));  // beyond, tanh is 1 in float
  const V far = one - quotient(splat(2.f), fma(exp_of_rest(r), power, one));
  return copy_sign((twice < splat(1.25f)) ? near : far, x);
}
FASTLM_INLINE Vec<double> tanh(Vec<double> x) {
  using V = Vec<double>;
  const V z = x * x;
  V p = fma(splat(-9.64399179425052238628e-1), z, splat(-9.92877231001918586564e1));
  p = fma(p, z, splat(-1.61468768441708447952e3));
  V q = z + splat(1.12811678491632931402e2);
  q = fma(q, z, splat(2.23548839060100448583e3));
  q = fma(q, z, splat(4.84406305325125486048e3));
  const V near = fma(x * z, p / q, x);
  const V a = abs(x), far = splat(1.) - splat(2.) / (exp(a + a) + splat(1.));
  return copy_sign((a < splat(0.625)) ? near : far, x);
}

FASTLM_INLINE float log(float x) { return __builtin_logf(x); }
FASTLM_INLINE double log(double x) { return __builtin_log(x); }
// x = 2^n m with m from sqrt(1/2) to sqrt(2), whose logarithm is 2 artanh s for s = (m - 1) / (m + 1): a series in s,
// which is less than 0.172. Fast for normal numbers above 0.
FASTLM_INLINE Vec<double> log(Vec<double> x) {
  using V = Vec<double>;
  using Bits = Vec<uint64_t>;
  const Bits bits = bits_of<Bits>(x);
  const Bits n = bits_of<Bits>(bits_of<Vec<int64_t>>(bits - 0x3fe6a09e667f3bcdu) >> 52);
  const V m = bits_of<V>(bits - (n << 52)), f = m - splat(1.), s = f / (f + splat(2.)), z = s * s;
  V p = splat(1. / 21);
#pragma GCC unroll 9
  for (int i = 19; i >= 3; i -= 2) p = fma(p, z, splat(1. / i));
  const V near = fma((s + s) * z, p, s + s);
  const V exponent = bits_of<V>(n + 0x4338000000000000u) - splat(6755399441055744.);  // 1.5 * 2^52
  // log 2 in two parts, of which the first has 21 bits: its products are exact.
  V y = fma(exponent, splat(0.693147182464599609375), fma(exponent, splat(-1.90465429995776787854e-9), near));
  const V others = select((x >= splat(0x1p-1022)) & (x < splat(__builtin_inf())), V{}, splat(1.));
  if (reduce_add(others) != 0)
    for (int i = 0; i < kLanes<double>; ++i)
      if (others[i] != 0) y[i] = log(x[i]);
  return y;
}

// ---- threads ----

// f(begin, end) over [0, n), statically divided.
template <class F> inline void parallel(const Pool& pool, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  pool.parallel_for(
      n, grain,
      [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(i) for each i in [0, n), handed out one by one: for items of unequal cost.
template <class F> inline void parallel_items(const Pool& pool, int64_t n, const F& f) {
  const int64_t workers = least<int64_t>(pool.threads, n);
  int64_t next = 0;
  parallel(pool, workers, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= n) return;
      f(i);
    }
  });
}

}  // namespace fastlm::FASTLM_ISA
