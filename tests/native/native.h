// What the kernel bodies need from outside, without torch: a pool of real threads and scratch memory
// that is allocated at every growth, so that the sanitizers see each buffer's exact size.
#pragma once
#include <cstdlib>

#include "cpu/own_threads.h"

namespace fastlm {

inline int test_threads = 1;

inline Pool test_pool(int threads) {
  test_threads = threads;
  return {[](int64_t n, int64_t grain, RangeFn f, void* ctx) { run_on_own_threads(test_threads, n, grain, f, ctx); },
          threads};
}

const Caches& caches() {
  static const Caches some{1 << 20, 16 << 20};
  return some;
}
void* thread_scratch(ScratchSlot slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[kScratchSlots];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    std::free(b.data);
    b.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    b.size = bytes;
  }
  return b.data;
}

}  // namespace fastlm
