// A model of the AVX-512 instructions that the kernels name, from Intel's Software Developer's Manual, for
// machines without them: what AVX-512 machines run is compiled and tested on any that has AVX2. Vectors
// of 64 bytes are the compiler's own, so that everything else of the language works on them anyway.
//
// Included by simd.h with FASTLM_AVX512_MODEL, of dot products of bf16 too with FASTLM_AVX512_BF16_MODEL.
#pragma once
#include <immintrin.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace instruction {

#define FASTLM_MODEL inline __attribute__((always_inline))

typedef uint16_t Half __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t DoubleWords __attribute__((vector_size(64)));

template <class To, class From> FASTLM_MODEL To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// Lanes whose bit is 0 are not touched in memory.
template <class E, class V> FASTLM_MODEL V load(uint32_t mask, const void* p) {
  E lane[sizeof(V) / sizeof(E)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(E); ++i)
    if (mask >> i & 1) __builtin_memcpy(&lane[i], static_cast<const E*>(p) + i, sizeof(E));
  return __builtin_bit_cast(V, lane);
}
template <class E, class V> FASTLM_MODEL void store(void* p, uint32_t mask, V v) {
  E lane[sizeof(V) / sizeof(E)];
  __builtin_memcpy(lane, &v, sizeof v);
  for (size_t i = 0; i < sizeof(V) / sizeof(E); ++i)
    if (mask >> i & 1) __builtin_memcpy(static_cast<E*>(p) + i, &lane[i], sizeof(E));
}
FASTLM_MODEL void stream(void* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  __m256i half[2];
  __builtin_memcpy(half, &v, sizeof v);
  _mm256_stream_si256(static_cast<__m256i*>(p), half[0]);
  _mm256_stream_si256(static_cast<__m256i*>(p) + 1, half[1]);
}

// The second operand where one is NaN, or both are zeros.
template <class V> FASTLM_MODEL V max(V a, V b) { return a > b ? a : b; }
template <class V> FASTLM_MODEL V min(V a, V b) { return a < b ? a : b; }

// a * 2^floor(b), rounded once, subnormal results too.
template <class T> FASTLM_MODEL T scalef(T a, T b) {
  const T infinity = T(__builtin_inf());
  if (a != a || b != b) return a + b;
  if (b == infinity) return a == 0 ? T(__builtin_nan("")) : a * infinity;
  if (b == -infinity) return __builtin_isinf(a) ? T(__builtin_nan("")) : a * T(0);
  const double n = __builtin_floor(double(b)), far = 4096;
  return T(__builtin_ldexp(double(a), int(n > far ? far : n < -far ? -far : n)));
}
template <class T, class V> FASTLM_MODEL V scalef_lanes(V a, V b) {
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) a[i] = scalef<T>(a[i], b[i]);
  return a;
}

FASTLM_MODEL __m512 fnmadd(__m512 a, __m512 b, __m512 c) {  // c - a * b, rounded once
  for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(-a[i], b[i], c[i]);
  return c;
}

// As far from 1 / v as the instruction may be: 2^-14 of it.
FASTLM_MODEL __m512 reciprocal14(__m512 v) {
  const __m512 y = 1.f / v;
  return y == y ? bits_of<__m512>(bits_of<Words>(y) & 0xfffffe00u) : y;
}

FASTLM_MODEL __m512 from_half(__m256i h) {
  __m128i half[2];
  __builtin_memcpy(half, &h, sizeof h);
  const __m256 whole[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  return __builtin_bit_cast(__m512, whole);
}
template <int kRounding> FASTLM_MODEL __m256i to_half(__m512 v) {
  __m256 whole[2];
  __builtin_memcpy(whole, &v, sizeof v);
  const __m128i half[2] = {_mm256_cvtps_ph(whole[0], kRounding), _mm256_cvtps_ph(whole[1], kRounding)};
  return __builtin_bit_cast(__m256i, half);
}

FASTLM_MODEL __m512i widen(__m256i v) { return bits_of<__m512i>(__builtin_convertvector(bits_of<Half>(v), Words)); }
FASTLM_MODEL __m256i narrow(__m512i v) { return bits_of<__m256i>(__builtin_convertvector(bits_of<Words>(v), Half)); }

typedef int8_t Bytes __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(64)));
FASTLM_MODEL __m512i widen_bytes(__m128i v) {
  return bits_of<__m512i>(__builtin_convertvector(bits_of<Bytes>(v), Integers));
}
FASTLM_MODEL __m512 to_float(__m512i v) { return __builtin_convertvector(bits_of<Integers>(v), __m512); }

// Subnormal numbers are zeros to the instructions of bf16, whatever MXCSR says.
FASTLM_MODEL Words flush(Words x) { return (x & 0x7f800000u) == 0u ? x & 0x80000000u : x; }

FASTLM_MODEL __m256bh to_bf16(__m512 v) {
  const Words x = flush(bits_of<Words>(v)), nan = x | 0x400000u;
  const Words y = v == v ? x + 0x7fffu + (x >> 16 & 1u) : nan;
  return bits_of<__m256bh>(__builtin_convertvector(y >> 16, Half));
}

// sum + a.odd * b.odd, then + a.even * b.even, each a fused multiply-add to nearest even.
FASTLM_MODEL __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
  const auto add = [](__m512 c, Words x, Words y) {
    const __m512 fx = bits_of<__m512>(flush(x)), fy = bits_of<__m512>(flush(y));
    c = bits_of<__m512>(flush(bits_of<Words>(c)));
    for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(fx[i], fy[i], c[i]);
    return bits_of<__m512>(flush(bits_of<Words>(c)));
  };
  const Words x = bits_of<Words>(a), y = bits_of<Words>(b);
  sum = add(sum, x & 0xffff0000u, y & 0xffff0000u);
  return add(sum, x << 16, y << 16);
}

// Lanes of 16 bits, each from the place that its index names.
FASTLM_MODEL __m512i permute(__m512i index, __m512i v) {
  uint16_t place[32], from[32], to[32];
  __builtin_memcpy(place, &index, sizeof place);
  __builtin_memcpy(from, &v, sizeof from);
  for (int i = 0; i < 32; ++i) to[i] = from[place[i] & 31];
  return __builtin_bit_cast(__m512i, to);
}
FASTLM_MODEL __m512i permute_or_zero(uint32_t mask, __m512i index, __m512i v) {
  const __m512i permuted = permute(index, v);
  return load<uint16_t, __m512i>(mask, &permuted);
}
// Of 32 bits.
FASTLM_MODEL __m512i permute_words(__m512i index, __m512i v) {
  const Words place = bits_of<Words>(index), from = bits_of<Words>(v);
  Words to;
  for (int i = 0; i < 16; ++i) to[i] = from[place[i] & 15];
  return bits_of<__m512i>(to);
}
FASTLM_MODEL __m512i join(__m256i low, __m256i high) {
  const __m256i half[2] = {low, high};
  return __builtin_bit_cast(__m512i, half);
}
template <int kHalf> FASTLM_MODEL __m256i half(__m512i v) {
  __m256i halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  return halves[kHalf];
}

FASTLM_MODEL __m512i multiply_even(__m512i a, __m512i b) {
  const DoubleWords low = DoubleWords{} + 0xffffffffu;
  return bits_of<__m512i>((bits_of<DoubleWords>(a) & low) * (bits_of<DoubleWords>(b) & low));
}
FASTLM_MODEL __m512i blend(uint32_t mask, __m512i a, __m512i b) {
  Words x = bits_of<Words>(a);
  const Words y = bits_of<Words>(b);
  for (int i = 0; i < 16; ++i) x[i] = mask >> i & 1 ? y[i] : x[i];
  return bits_of<__m512i>(x);
}

}  // namespace instruction

#define _mm512_maskz_loadu_ps instruction::load<float, __m512>
#define _mm512_maskz_loadu_pd instruction::load<double, __m512d>
#define _mm256_maskz_loadu_epi16 instruction::load<uint16_t, __m256i>
#define _mm512_mask_storeu_ps instruction::store<float>
#define _mm512_mask_storeu_pd instruction::store<double>
#define _mm256_mask_storeu_epi16 instruction::store<uint16_t>
#define _mm512_stream_si512 instruction::stream
#define _mm512_fnmadd_ps instruction::fnmadd
#define _mm512_max_ps instruction::max
#define _mm512_max_pd instruction::max
#define _mm512_min_ps instruction::min
#define _mm512_min_pd instruction::min
#define _mm512_scalef_ps instruction::scalef_lanes<float>
#define _mm512_scalef_pd instruction::scalef_lanes<double>
#define _mm512_rcp14_ps instruction::reciprocal14
#define _mm512_cvtepu16_epi32 instruction::widen
#define _mm512_cvtepi32_epi16 instruction::narrow
#define _mm512_cvtepi8_epi32 instruction::widen_bytes
#define _mm512_cvtepi32_ps instruction::to_float
#define _mm512_cvtph_ps instruction::from_half
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) instruction::to_half<(rounding) & 7>(v)
#define _mm512_set1_epi32(x) instruction::bits_of<__m512i>(instruction::Words{} + uint32_t(x))
#undef _mm512_srli_epi64
#define _mm512_srli_epi64(v, n) \
  instruction::bits_of<__m512i>(instruction::bits_of<instruction::DoubleWords>(v) >> (n))
#define _mm512_permutexvar_epi16 instruction::permute
#define _mm512_maskz_permutexvar_epi16 instruction::permute_or_zero
#define _mm512_permutexvar_epi32 instruction::permute_words
#define _mm512_castsi256_si512(v) instruction::join(v, __m256i{})
#undef _mm512_inserti64x4
#define _mm512_inserti64x4(v, high, i) instruction::join(instruction::half<1 - (i)>(v), high)
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64(v, i) instruction::half<(i)>(v)
#define _mm512_castsi512_si256 instruction::half<0>
#define _mm512_mul_epu32 instruction::multiply_even
#define _mm512_mask_blend_epi32 instruction::blend

#if defined(FASTLM_AVX512_BF16_MODEL)
#define __AVX512BF16__ 1
#define _mm512_cvtneps_pbh instruction::to_bf16
#define _mm512_cvtne2ps_pbh(high, low) \
  instruction::bits_of<__m512bh>(instruction::join(instruction::bits_of<__m256i>(instruction::to_bf16(low)), \
                                                   instruction::bits_of<__m256i>(instruction::to_bf16(high))))
#define _mm512_dpbf16_ps instruction::dot
#endif
