// What device.cuh includes where the compiler is not nvcc: a CUDA device that runs on the CPU.
//
// names.h: CUDA's names that need no model. model.h: launches, blocks, lanes, meetings. Here: CUDA's
// barriers, shuffles, votes and atomics. primitives.h: those of device.cuh. races.h: what no barrier orders.
// simt.cpp goes with each program.
#pragma once
#include "model.h"
#include "names.h"

namespace fastlm::cuda {

inline void __syncthreads(SIMT_HERE) { simt::meet_block(at); }

inline void __syncwarp(uint32_t mask = ~0u, SIMT_HERE) {
  simt::meet({simt::Op::syncwarp, mask, nullptr, at}, [](const simt::Call*) { simt::pass_warp_barrier(); });
}

// ---- shuffles ------------------------------------------------------------------------------

// The value of lane from(own lane, first lane of its group of `width`), or its own where that gives -1.
template <class T, class From>
inline T simt_shuffle(uint32_t mask, T value, int width, simt::Site at, const From& from) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1))) simt::fail("the width is no power of two to 32", at);
  const int lane = std::countr_zero(simt::self->bit), source = from(lane, lane & -width);
  if (source >= 0 && !(mask >> source & 1))
    simt::fail("lane " + std::to_string(lane) + " reads from lane " + std::to_string(source) +
                   ", which the mask does not name", at);
  struct Operand { T value, result; int source; } own{value, value, source};
  simt::meet({simt::Op::shuffle, mask, &own, at}, [mask](const simt::Call* calls) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      Operand& to = *static_cast<Operand*>(calls[std::countr_zero(rest)].operand);
      if (to.source >= 0) to.result = static_cast<Operand*>(calls[to.source].operand)->value;
    }
  });
  return own.result;
}

template <class T> inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, SIMT_HERE) {
  return simt_shuffle(mask, value, width, at, [=](int, int first) { return first + (lane & (width - 1)); });
}
template <class T> inline T __shfl_up_sync(uint32_t mask, T value, unsigned step, int width = 32, SIMT_HERE) {
  return simt_shuffle(mask, value, width, at, [=](int own, int first) {
    return step <= unsigned(own - first) ? own - int(step) : -1;
  });
}
template <class T> inline T __shfl_down_sync(uint32_t mask, T value, unsigned step, int width = 32, SIMT_HERE) {
  return simt_shuffle(mask, value, width, at, [=](int own, int first) {
    return step < unsigned(first + width - own) ? own + int(step) : -1;
  });
}
template <class T> inline T __shfl_xor_sync(uint32_t mask, T value, int turn, int width = 32, SIMT_HERE) {
  return simt_shuffle(mask, value, width, at, [=](int own, int first) {
    return (own ^ turn) < first + width ? own ^ turn : -1;
  });
}

// ---- votes ---------------------------------------------------------------------------------

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_HERE) {
  struct Operand { bool yes; uint32_t result; } own{predicate != 0, 0};
  simt::meet({simt::Op::vote, mask, &own, at}, [mask](const simt::Call* calls) {
    uint32_t yes = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      yes |= uint32_t(static_cast<Operand*>(calls[lane].operand)->yes) << lane;
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1)
      static_cast<Operand*>(calls[std::countr_zero(rest)].operand)->result = yes;
  });
  return own.result;
}
inline int __any_sync(uint32_t mask, int predicate, SIMT_HERE) { return __ballot_sync(mask, predicate, at) != 0; }
inline int __all_sync(uint32_t mask, int predicate, SIMT_HERE) { return __ballot_sync(mask, predicate, at) == mask; }

// ---- atomics and fences --------------------------------------------------------------------
// Atomics are relaxed, as CUDA's: what they order, __threadfence orders. The thread sanitizer knows no
// fences; it is told of one as a release to the atomics after it and an acquire from the one before it.

#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#endif

inline void __threadfence() {
#ifdef __SANITIZE_THREAD__
  if (simt::self->atomic) __tsan_acquire(simt::self->atomic);
  simt::self->fenced = true;
#elif defined(SIMT_THREADS)
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
inline void __threadfence_block() { __threadfence(); }

template <class T, class F> inline T simt_atomic(T* p, simt::Site at, const F& next) {
  if (uintptr_t(p) % sizeof(T)) simt::fail("misaligned atomic access", at);
#ifdef __SANITIZE_THREAD__
  if (simt::self->fenced) __tsan_release(p);
  simt::self->atomic = p;
#endif
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  do after = next(before);
  while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

// T is int, unsigned, unsigned long long or a floating type, the operand converts to it.
template <class T> inline T atomicAdd(T* p, std::type_identity_t<T> x, SIMT_HERE) {
  return simt_atomic(p, at, [x](T old) { return T(old + x); });
}
template <class T> inline T atomicMax(T* p, std::type_identity_t<T> x, SIMT_HERE) {
  return simt_atomic(p, at, [x](T old) { return old < x ? x : old; });
}
template <class T> inline T atomicMin(T* p, std::type_identity_t<T> x, SIMT_HERE) {
  return simt_atomic(p, at, [x](T old) { return x < old ? x : old; });
}
template <class T> inline T atomicOr(T* p, std::type_identity_t<T> x, SIMT_HERE) {
  return simt_atomic(p, at, [x](T old) { return old | x; });
}
template <class T> inline T atomicExch(T* p, std::type_identity_t<T> x, SIMT_HERE) {
  return simt_atomic(p, at, [x](T) { return x; });
}
template <class T>
inline T atomicCAS(T* p, std::type_identity_t<T> want, std::type_identity_t<T> x, SIMT_HERE) {
  return simt_atomic(p, at, [=](T old) { return old == want ? x : old; });
}

}  // namespace fastlm::cuda

#include "primitives.h"
