// What the bindings (with torch) and the kernel bodies (without) share: storage types, the
// thread-pool hook and per-thread scratch. Plain data only: a body's translation unit is
// compiled for one ISA, and an inline function here could be emitted with its instructions
// and then be picked by the linker for every CPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastlm {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

enum DType : int { kF64, kF32, kBF16, kF16, kDTypes };

// torch's parallel_for without its error code: calls f(begin, end, ctx) over [0, n) in chunks of
// at least `grain`. Nested calls run serially. `threads` is the size of the pool.
using RangeFn = void (*)(int64_t begin, int64_t end, void* ctx);
struct Pool {
  void (*parallel_for)(int64_t n, int64_t grain, RangeFn f, void* ctx);
  int threads;
};

// 64-byte aligned memory of the calling thread, kept between calls and grown on demand.
// A slot is one buffer: two live uses in one call stack take two slots.
enum ScratchSlot : int { kScratchKernel, kScratchPack, kScratchTile, kScratchSlots };
void* thread_scratch(ScratchSlot slot, size_t bytes);

// Bytes of this machine's second-level cache, a core's own, and of the third, which cores share.
struct Caches { int64_t second, third; };
const Caches& caches();

}  // namespace fastlm
