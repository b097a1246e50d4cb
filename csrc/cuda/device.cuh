// What the kernels ask of the machine, as named functions: conversions, matrix instructions, copies to
// shared memory, vectorised loads and stores, reductions, Philox. The only file with inline PTX.
//
// Compiled by nvcc, the primitives are instructions. Compiled by a C++ compiler, they come from simt.h
// (tests/simt), which runs blocks of threads on the CPU: the fragments below are laid out there as the
// PTX ISA has them, copies arrive at their wait, and accesses are counted. What is built from the
// primitives stands behind them once, for both.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define FASTLM_DEVICE __device__ __forceinline__
#else
#include "simt.h"
#define FASTLM_DEVICE inline
#endif

namespace fastlm::cuda {

#ifdef __CUDACC__

struct alignas(2) bf16 { uint16_t bits; };
struct alignas(2) f16 { uint16_t bits; };
struct alignas(4) tf32 { float value; };  // a float32, of which products take what round_tf32 leaves

// ---- conversions ---------------------------------------------------------------------------

FASTLM_DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FASTLM_DEVICE float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// To nearest, ties to even.
FASTLM_DEVICE void narrow_to(f16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
FASTLM_DEVICE void narrow_to(bf16& y, float x) {
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32_t bits = __float_as_uint(x);
  y.bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fff);
#endif
}

#if __CUDA_ARCH__ < 800
template <class T> FASTLM_DEVICE uint32_t pack_narrowed(float low, float high) {
  T a, b;
  narrow_to(a, low);
  narrow_to(b, high);
  return uint32_t(b.bits) << 16 | a.bits;
}
#endif

// Two values as the elements 0 (low half) and 1 of a register.
FASTLM_DEVICE uint32_t pack(float low, float high, f16) {
#if __CUDA_ARCH__ >= 800
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return pack_narrowed<f16>(low, high);
#endif
}
FASTLM_DEVICE uint32_t pack(float low, float high, bf16) {
#if __CUDA_ARCH__ >= 800
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  return pack_narrowed<bf16>(low, high);
#endif
}

// To 10 bits of the fraction, ties away from 0. From sm_80 on.
FASTLM_DEVICE float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

FASTLM_DEVICE float exp2_fast(float x) {  // 2 ulp; 0 for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTLM_DEVICE float reciprocal_fast(float x) {  // 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- matrix instructions -------------------------------------------------------------------

// Shared-memory address of a generic pointer, as the instructions below take it.
FASTLM_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four matrices of 8 x 8 16-bit elements: lane 8 i + j gives the address of row j of matrix i, 16 bytes.
// Lane l receives in r[i] the elements (l / 4, 2 (l % 4)) and the next of matrix i; of 8 x 4 32-bit elements
// the one at (l / 4, l % 4).
FASTLM_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: lane l receives (2 (l % 4), l / 4) and the one in the next row.
FASTLM_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#if __CUDA_ARCH__ < 800
// m16n8k16 by shuffles and multiply-adds, for the type that Turing's tensor cores lack. Not unrolled: kernels
// have hundreds of these products.
FASTLM_DEVICE void mma_without_tensor_cores(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32, row = lane & ~3, column = (lane % 4) * 8;
#pragma unroll 1
  for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b = half ? b1 : b0;
      const uint32_t up = __shfl_sync(~0u, a[2 * half], row + pair), down = __shfl_sync(~0u, a[2 * half + 1], row + pair);
      const uint32_t left = __shfl_sync(~0u, b, column + pair), right = __shfl_sync(~0u, b, column + 4 + pair);
#pragma unroll
      for (int shift = 16; shift >= 0; shift -= 16) {
        const auto value = [&](uint32_t x) { return __uint_as_float((x << shift) & 0xffff0000u); };
        c[0] += value(up) * value(left);
        c[1] += value(up) * value(right);
        c[2] += value(down) * value(left);
        c[3] += value(down) * value(right);
      }
    }
  }
}
#endif

// c += a b: a 16 x 16, b 16 x 8, with g = lane / 4 and t = lane % 4
//   a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8), each with the next column
//   b0 (2t, g), b1 (2t + 8, g), each with the next row
//   c[0], c[1] (g, 2t) and the next column, c[2], c[3] (g + 8, 2t) and the next
FASTLM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_without_tensor_cores(c, a, b0, b1);
#endif
}
FASTLM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// The same with a 16 x 8 and b 8 x 8, both rounded; from sm_80 on:
//   a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4)
//   b0 (t, g), b1 (t + 4, g)
FASTLM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, tf32) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- products of warpgroups ----------------------------------------------------------------
// A warpgroup is four warps, the first of a number that 4 divides. Of the 64 rows of its matrices each warp has 16, as
// in mma, in registers that nobody reads or writes from a product's start to the wait for it. Compiled for sm_90a:
// kernels of these have no body elsewhere.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kWarpgroupProducts = true;
#else
inline constexpr bool kWarpgroupProducts = false;
#endif

// The compiler keeps what comes before and behind this apart, as far as these registers go.
template <int N> FASTLM_DEVICE void settle(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3]) :: "memory");
}
template <int N> FASTLM_DEVICE void settle(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3]) :: "memory");
}

// Stands between writes to registers of products, which are given, and the first of these products.
template <class... Registers> FASTLM_DEVICE void wgmma_fence(Registers&... registers) {
  (settle(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group of products.
FASTLM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups are under way. The registers given are of those that are not.
template <int PENDING, class... Registers> FASTLM_DEVICE void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
  (settle(registers), ...);
}
// Behind it and a barrier, products read what this thread has written to shared memory, or copied and waited for.
FASTLM_DEVICE void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define FASTLM_4(c) "+f"((c)[0]), "+f"((c)[1]), "+f"((c)[2]), "+f"((c)[3])
#define FASTLM_32(c) FASTLM_4((c)[0]), FASTLM_4((c)[1]), FASTLM_4((c)[2]), FASTLM_4((c)[3]), \
  FASTLM_4((c)[4]), FASTLM_4((c)[5]), FASTLM_4((c)[6]), FASTLM_4((c)[7])
#define FASTLM_0_TO_31 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLM_32_TO_63 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTLM_WGMMA(type, columns, numbers, words, matrix, add_c, turned, ...)                                   \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_c ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns        \
               "k16.f32." type "." type " {" numbers "}, {" words "}, " matrix ", add, 1, 1, " turned ";\n}"           \
               : __VA_ARGS__                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(TRANSPOSED))           \
               : "memory")

// Starts c += a b, or c = a b unless `add`: a 64 x 16, b 16 x 8 N as a descriptor has it. TRANSPOSED: what lies
// together in shared memory are rows of b, else columns.
template <bool TRANSPOSED>
FASTLM_DEVICE void wgmma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add, bf16) {
  FASTLM_WGMMA("bf16", "64", FASTLM_0_TO_31, "%32, %33, %34, %35", "%36", "%37", "%38", FASTLM_32(c));
}
template <bool TRANSPOSED>
FASTLM_DEVICE void wgmma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add, f16) {
  FASTLM_WGMMA("f16", "64", FASTLM_0_TO_31, "%32, %33, %34, %35", "%36", "%37", "%38", FASTLM_32(c));
}
template <bool TRANSPOSED>
FASTLM_DEVICE void wgmma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add, bf16) {
  FASTLM_WGMMA("bf16", "128", FASTLM_0_TO_31 ", " FASTLM_32_TO_63, "%64, %65, %66, %67", "%68", "%69", "%70",
               FASTLM_32(c), FASTLM_32(c + 8));
}
template <bool TRANSPOSED>
FASTLM_DEVICE void wgmma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add, f16) {
  FASTLM_WGMMA("f16", "128", FASTLM_0_TO_31 ", " FASTLM_32_TO_63, "%64, %65, %66, %67", "%68", "%69", "%70",
               FASTLM_32(c), FASTLM_32(c + 8));
}
#undef FASTLM_WGMMA
#undef FASTLM_32_TO_63
#undef FASTLM_0_TO_31
#undef FASTLM_32
#undef FASTLM_4

// ---- memory --------------------------------------------------------------------------------

// 16 bytes from global to shared memory, or zeros where not `valid`; they are there for this thread
// after cp_async_wait, for the others after a barrier behind it.
FASTLM_DEVICE void cp_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}
// Closes a group of this thread's copies.
FASTLM_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING> FASTLM_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#endif
}

// Copies of 16 bytes that a loop unrolls: without cp.async each is in registers on its way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr int kCopiesUnrolled = 1;
#else
inline constexpr int kCopiesUnrolled = 4;
#endif

// V is a type of 1 to 16 bytes, p aligned to its size. On the CPU these are the accesses that are counted.
template <class V> FASTLM_DEVICE V load_global(const V* p) { return *p; }
template <class V> FASTLM_DEVICE void store_global(V* p, V value) { *p = value; }
template <class V> FASTLM_DEVICE V load_shared(const V* p) { return *p; }
template <class V> FASTLM_DEVICE void store_shared(V* p, V value) { *p = value; }

// The block's dynamic shared memory, aligned to 1024 bytes, after which what wgmma reads is laid out.
FASTLM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char fastlm_shared_memory[];
  return fastlm_shared_memory;
}

// `blocks` blocks of a cooperative launch meet; what was written before is seen after it.
// arrived: their counter in global memory, 0 at the launch, that nobody else touches; round: how many times
// they have met, from 0. Both may wrap. Plain loads and stores are right around it: what the block's first thread
// releases and acquires are those of all, as the block's own barriers order them.
FASTLM_DEVICE void grid_barrier(uint32_t* arrived, uint32_t round, uint32_t blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const size_t counter = __cvta_generic_to_global(arrived);
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
    uint32_t seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (int32_t(seen - blocks * (round + 1)) < 0);
  }
  __syncthreads();
}

#endif  // __CUDACC__

// ---- built from these ----------------------------------------------------------------------

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr uint32_t kAllLanes = 0xffffffffu;

FASTLM_DEVICE float widen(float x) { return x; }
FASTLM_DEVICE float widen(tf32 x) { return x.value; }
FASTLM_DEVICE double widen(double x) { return x; }
FASTLM_DEVICE void narrow_to(float& y, float x) { y = x; }
FASTLM_DEVICE void narrow_to(tf32& y, float x) { y.value = x; }
FASTLM_DEVICE void narrow_to(double& y, double x) { y = x; }
template <class T, class F> FASTLM_DEVICE T narrow(F x) {
  T y;
  narrow_to(y, x);
  return y;
}

// Whether tensor cores make products of T.
template <class T> inline constexpr bool kTensorCores = true;
template <> inline constexpr bool kTensorCores<float> = false;

// Whether this GPU has kernels of T; their bodies are left out where nobody launches them.
template <class T> inline constexpr bool kServed = true;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <> inline constexpr bool kServed<tf32> = false;
#endif

// x as products of T take it, and the words of a fragment.
template <class T> FASTLM_DEVICE T operand(T x) { return x; }
FASTLM_DEVICE tf32 operand(tf32 x) { return {round_tf32(x.value)}; }
template <class T, int N> FASTLM_DEVICE void to_operands(uint32_t (&)[N], T) {}
template <int N> FASTLM_DEVICE void to_operands(uint32_t (&x)[N], tf32) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = __float_as_uint(round_tf32(__uint_as_float(x[i])));
}

// The type of T's tensors, for kernels that make no products.
template <class T> struct StoredAs { using type = T; };
template <> struct StoredAs<tf32> { using type = float; };
template <class T> using stored_t = typename StoredAs<T>::type;

// The type in which sums over T are made.
template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };
template <class T> using compute_t = typename ComputeOf<T>::type;

// Descriptor of a matrix that wgmma reads: rows of 64 16-bit elements behind each other, their chunks of 16 bytes
// exchanged as Tile<T, 64> does from 1024 bytes to the next; what it has beyond the 64th column lies `panel` bytes
// further on. A part of it is that many bytes further: of rows, 8 or more; of columns, within a panel.
FASTLM_DEVICE uint64_t matrix_descriptor(const void* p, uint32_t panel) {
  constexpr uint64_t kEightRows = 1024, k128ByteSwizzle = 1;
  return shared_address(p) / 16 | uint64_t(panel / 16) << 16 | kEightRows / 16 << 32 | k128ByteSwizzle << 62;
}
FASTLM_DEVICE uint64_t part_of_matrix(uint64_t descriptor, uint32_t bytes) { return descriptor + bytes / 16; }

// N elements that are loaded and stored as one; N sizeof(T) is at most 16.
template <class T, int N> struct alignas(N * sizeof(T)) Pack {
  static_assert(N * sizeof(T) <= 16);
  T x[N];
};
template <class T> inline constexpr int kPerVector = 16 / sizeof(T);

FASTLM_DEVICE int lane_index() { return int(threadIdx.x % 32); }
FASTLM_DEVICE int warp_index() { return int(threadIdx.x / 32); }

// Over the lanes of a warp, or of each group of WIDTH neighbours; every lane has the result.
template <int WIDTH = 32, class T, class F> FASTLM_DEVICE T warp_reduce(T x, const F& join) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
template <int WIDTH = 32, class T> FASTLM_DEVICE T warp_sum(T x) {
  return warp_reduce<WIDTH>(x, [](T a, T b) { return a + b; });
}
template <int WIDTH = 32, class T> FASTLM_DEVICE T warp_max(T x) {
  return warp_reduce<WIDTH>(x, [](T a, T b) { return a > b ? a : b; });
}

// Over the block's WARPS warps, in their order; every thread has the result. scratch: WARPS elements of
// shared memory, free again at the block's next barrier.
template <int WARPS, class T, class F> FASTLM_DEVICE T block_reduce(T x, T* scratch, const F& join) {
  x = warp_reduce(x, join);
  if (lane_index() == 0) store_shared(scratch + warp_index(), x);
  __syncthreads();
  T all = load_shared(scratch);
#pragma unroll
  for (int w = 1; w < WARPS; ++w) all = join(all, load_shared(scratch + w));
  return all;
}

// 2 ulp or so: a ratio of exponentials, near 0 the series.
FASTLM_DEVICE float tanh_of(float x) {
  const float size = fabsf(x), e = exp2_fast(size * (-2 * kLog2e));
  const float t = (1 - e) * reciprocal_fast(1 + e), s = x * x;
  const float series = x * (1 + s * (-1 / 3.f + s * (2 / 15.f + s * (-17 / 315.f + s * (62 / 2835.f)))));
  return size < 0.25f ? series : x < 0 ? -t : t;
}
FASTLM_DEVICE double tanh_of(double x) { return tanh(x); }
FASTLM_DEVICE float sigmoid_of(float x) { return reciprocal_fast(1 + exp2_fast(-x * kLog2e)); }
FASTLM_DEVICE double sigmoid_of(double x) { return 1 / (1 + exp(-x)); }

// Philox 4x32, 10 rounds (Salmon et al. 2011), as reference.dropout_keep counts: word k % 4 of the block
// (key k / 4, query, head) is that of key k.
struct RandomWords { uint32_t x[4]; };
FASTLM_DEVICE RandomWords random_words(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t c3 = 0, key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t x0 = uint32_t(b >> 32) ^ c1 ^ key0, x2 = uint32_t(a >> 32) ^ c3 ^ key1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = x0;
    c2 = x2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastlm::cuda
