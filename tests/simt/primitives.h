// The primitives of device.cuh for a C++ compiler. Fragments are laid out as the PTX ISA has them for
// ldmatrix, mma.m16n8k16, wgmma and, of tf32, mma.m16n8k8; cp.async copies, and wgmma multiplies, at the wait, and
// both leave NaNs until then.
#pragma once
#include "model.h"

namespace fastlm::cuda {

struct alignas(2) bf16 { uint16_t bits; };
struct alignas(2) f16 { uint16_t bits; };
struct alignas(4) tf32 { float value; };

// ---- conversions ---------------------------------------------------------------------------

inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t bits = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t finite = __float_as_uint(__uint_as_float(bits) * 0x1p112f);  // subnormal ones too
  return __uint_as_float(sign | (bits >= 0x0f800000 ? bits | 0x7f800000 : finite));
}

inline void narrow_to(bf16& y, float x) {
  const uint32_t bits = __float_as_uint(x);
  y.bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fff);
}
inline void narrow_to(f16& y, float x) {
  const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffff;
  uint32_t h = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  if (size < 0x38800000) h = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000;  // subnormal
  if (size >= 0x477ff000) h = 0x7c00;
  y.bits = x == x ? uint16_t((bits >> 16 & 0x8000) | h) : uint16_t(0x7fff);
}

template <class T> inline uint32_t pack(float low, float high, T) {
  T a, b;
  narrow_to(a, low);
  narrow_to(b, high);
  return uint32_t(b.bits) << 16 | a.bits;
}

inline float round_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000) == 0x7f800000) return x == x ? x : __uint_as_float(0x7fffffff);
  return __uint_as_float((bits + 0x1000) & ~0x1fffu);
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

// ---- matrix instructions -------------------------------------------------------------------

template <bool TRANSPOSED> inline void simt_ldmatrix(uint32_t (&r)[4], const void* row, simt::Site at) {
  simt::check_shared(row, 16, at);
  simt::check_race(row, 16, false, at);
  struct Operand { uint32_t* r; const void* row; } own{r, row};
  simt::meet({simt::Op::load_matrix, ~0u, &own, at}, [at](const simt::Call* calls) {
    const void* rows[32];
    for (int lane = 0; lane < 32; ++lane) rows[lane] = static_cast<Operand*>(calls[lane].operand)->row;
    if (simt::counting) simt::count_matrix(rows, at);
    for (int i = 0; i < 4; ++i) {
      uint16_t x[8][8];
      for (int j = 0; j < 8; ++j) __builtin_memcpy(x[j], rows[8 * i + j], 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = 2 * (lane % 4);
        const uint16_t low = TRANSPOSED ? x[t][g] : x[g][t], high = TRANSPOSED ? x[t + 1][g] : x[g][t + 1];
        static_cast<Operand*>(calls[lane].operand)->r[i] = uint32_t(high) << 16 | low;
      }
    }
  });
}
inline void ldmatrix(uint32_t (&r)[4], const void* row, SIMT_HERE) { simt_ldmatrix<false>(r, row, at); }
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row, SIMT_HERE) { simt_ldmatrix<true>(r, row, at); }

template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T, SIMT_HERE) {
  struct Operand { float* c; const uint32_t* a; uint32_t b[2]; } own{c, a, {b0, b1}};
  simt::meet({simt::Op::mma, ~0u, &own, at}, [](const simt::Call* calls) {
    using Four = float __attribute__((vector_size(16)));
    struct Row { Four left, right; float& operator[](int n) { return reinterpret_cast<float*>(this)[n]; } };
    const auto value = [](uint32_t x, int i) { return widen(T{uint16_t(x >> 16 * i)}); };
    float a[16][16];
    Row b[16], c[16];
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& x = *static_cast<const Operand*>(calls[lane].operand);
      const int g = lane / 4, t = 2 * (lane % 4);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) a[g + j % 2 * 8][t + j / 2 * 8 + i] = value(x.a[j], i);
        for (int j = 0; j < 2; ++j) b[t + j * 8 + i][g] = value(x.b[j], i);
        c[g][t + i] = x.c[i];
        c[g + 8][t + i] = x.c[2 + i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      Four left = c[row].left, right = c[row].right;
      for (int k = 0; k < 16; ++k) {
        left += a[row][k] * b[k].left;
        right += a[row][k] * b[k].right;
      }
      c[row] = {left, right};
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& x = *static_cast<const Operand*>(calls[lane].operand);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x.c[j] = c[lane / 4 + j / 2 * 8][2 * (lane % 4) + j % 2];
    }
  });
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, tf32, SIMT_HERE) {
  struct Operand { float* c; const uint32_t* a; uint32_t b[2]; } own{c, a, {b0, b1}};
  simt::meet({simt::Op::mma, ~0u, &own, at}, [at](const simt::Call* calls) {
    const auto value = [at](uint32_t bits) {
      const float x = __uint_as_float(bits);
      if (x == x && bits & 0x1fff) simt::fail("a factor is not rounded to tf32", at);
      return x;
    };
    float a[16][8], b[8][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& x = *static_cast<const Operand*>(calls[lane].operand);
      const int g = lane / 4, t = lane % 4;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        a[g + j % 2 * 8][t + j / 2 * 4] = value(x.a[j]);
        c[g + j / 2 * 8][2 * t + j % 2] = x.c[j];
      }
      for (int j = 0; j < 2; ++j) b[t + j * 4][g] = value(x.b[j]);
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 8; ++k)
#pragma GCC unroll 8
        for (int n = 0; n < 8; ++n) c[row][n] += a[row][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& x = *static_cast<const Operand*>(calls[lane].operand);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x.c[j] = c[lane / 4 + j / 2 * 8][2 * (lane % 4) + j % 2];
    }
  });
}

// ---- products of warpgroups ----------------------------------------------------------------

inline constexpr bool kWarpgroupProducts = true;

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - simt::self->warp->block->shared);
}

template <bool TRANSPOSED, int N, class T>
inline void wgmma(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b, bool add, T, SIMT_HERE) {
  static_assert(N == 8 || N == 16);
  struct Operand { float* c; const uint32_t* a; uint64_t b; bool add; } own{c[0], a, b, add};
  simt::meet({simt::Op::wgmma, ~0u, &own, at}, [&](const simt::Call* calls) {
    simt::Product x{{}, {}, {}, b, TRANSPOSED, add, N, 0, at, nullptr, {}};
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& from = *static_cast<const Operand*>(calls[lane].operand);
      if (from.b != b || from.add != add) simt::fail("lanes multiply with different matrices", at);
      x.c[lane] = from.c;
      x.a[lane] = from.a;
      __builtin_memcpy(x.words[lane], from.a, sizeof(x.words[lane]));
    }
    x.make = [](const simt::Product& x, const unsigned char* shared, float (&sums)[16][128]) {
      using Eight = float __attribute__((vector_size(32)));
      const auto value = [](uint32_t bits) { return widen(T{uint16_t(bits)}); };
      alignas(32) float a[16][16], b[16][8 * N];
      for (uint32_t lane = 0; lane < 32; ++lane)
        for (uint32_t i = 0; i < 8; ++i)
          a[lane / 4 + i / 2 % 2 * 8][2 * (lane % 4) + i / 4 * 8 + i % 2] = value(x.words[lane][i / 2] >> 16 * (i % 2));
      for (uint32_t k = 0; k < 16; ++k)
        for (uint32_t n = 0; n < 8 * N; ++n) b[k][n] = value(x.element(shared, k, n));
      for (int row = 0; row < 16; ++row) {
        Eight sum[N];
        __builtin_memcpy(sum, sums[row], sizeof(sum));
        for (int k = 0; k < 16; ++k)
          for (int n = 0; n < N; ++n) sum[n] += a[row][k] * reinterpret_cast<const Eight*>(b[k])[n];
        __builtin_memcpy(sums[row], sum, sizeof(sum));
      }
    };
    simt::start_product(std::move(x));
  });
}

template <class... Registers> inline void wgmma_fence(Registers&...) {
  simt::meet({simt::Op::wgmma_fence, ~0u, nullptr, simt::Site::current()},
             [](const simt::Call*) { simt::self->warp->fenced = true; });
}
inline void wgmma_commit(SIMT_HERE) {
  simt::meet({simt::Op::wgmma_commit, ~0u, nullptr, at}, [at](const simt::Call*) { simt::commit_products(at); });
}
template <int PENDING, class... Registers> inline void wgmma_wait(Registers&... registers) {
  simt::meet({simt::Op::wgmma_wait, ~0u, nullptr, simt::Site::current()},
             [](const simt::Call*) { simt::wait_for_products(PENDING); });
  const auto check = [](const void* begin, size_t bytes) {
    const auto* const from = static_cast<const unsigned char*>(begin);
    for (const simt::Product& x : simt::self->warp->products)
      for (const void* p : {static_cast<const void*>(x.c[std::countr_zero(simt::self->bit)]), static_cast<const void*>(x.a[std::countr_zero(simt::self->bit)])})
        if (p >= from && p < from + bytes) simt::fail("waits for registers of a product that may stay under way", x.at);
  };
  (check(&registers, sizeof(registers)), ...);
}

inline void fence_for_products() {
#ifndef SIMT_THREADS
  simt::self->fences.push_back(simt::self->warp->block->barriers);
#endif
}

// ---- memory --------------------------------------------------------------------------------

inline void cp_async(void* shared, const void* global, bool valid, SIMT_HERE) {
  simt::start_copy(shared, global, valid, at);
}
inline void cp_async_commit() { ++simt::self->groups; }
template <int PENDING> inline void cp_async_wait() { simt::wait_for_copies(PENDING); }

template <class V> inline constexpr bool kIsVector = sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0;

template <class V> inline void simt_access(simt::Memory memory, const V* p, simt::Site at) {
  static_assert(kIsVector<V>, "accesses are of 1, 2, 4, 8 or 16 bytes");
  memory == simt::Memory::shared ? simt::check_shared(p, sizeof(V), at) : simt::check_global(p, sizeof(V), at);
  if (simt::counting) simt::count(memory, p, sizeof(V), at);
}
template <class V> inline V load_global(const V* p, SIMT_HERE) {
  simt_access(simt::Memory::global, p, at);
  return *p;
}
template <class V> inline void store_global(V* p, V value, SIMT_HERE) {
  simt_access(simt::Memory::global, p, at);
  *p = value;
}
template <class V> inline V load_shared(const V* p, SIMT_HERE) {
  simt_access(simt::Memory::shared, p, at);
  simt::check_race(p, sizeof(V), false, at);
  return *p;
}
template <class V> inline void store_shared(V* p, V value, SIMT_HERE) {
  simt_access(simt::Memory::shared, p, at);
  simt::check_race(p, sizeof(V), true, at);
  *p = value;
}

inline unsigned char* shared_memory() { return simt::self->warp->block->shared; }

inline void grid_barrier(uint32_t* arrived, uint32_t round, uint32_t blocks, SIMT_HERE) {
  simt::meet_grid(arrived, round, blocks, at);
}

}  // namespace fastlm::cuda
