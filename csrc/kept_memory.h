// Memory of large results. Beyond malloc's largest threshold each result is new memory, whose pages the system
// clears before they are written: a cross-entropy waits as long for that as it computes. So the memory of a freed
// result is kept for the next one. The system may take its pages back whenever it runs short (MADV_FREE), and a
// forked process gets none of them (MADV_WIPEONFORK).
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <vector>
#endif

namespace fastlm {

class KeptMemory {
 public:
  // glibc's DEFAULT_MMAP_THRESHOLD_MAX.
  static constexpr size_t kLeast = size_t(32) << 20;

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_WIPEONFORK) && defined(MADV_HUGEPAGE)
  // A block of at least so many bytes, aligned to a huge page; null where the system refuses. `size` is the
  // block's own.
  static void* take(size_t bytes, size_t* size) {
    std::vector<Block> useless;
    {
      const Hold hold;
      if (hold.mine) {
        std::vector<Block>& kept = blocks();
        const auto fits = [&](const Block& b) { return b.size >= bytes; };
        const auto least = std::partition(kept.begin(), kept.end(), fits);
        const auto best =
            std::min_element(kept.begin(), least, [](const Block& a, const Block& b) { return a.size < b.size; });
        if (best != least) {
          const Block b = *best;
          kept.erase(best);
          madvise(b.data, b.size, MADV_KEEPONFORK);
          *size = b.size;
          return b.data;
        }
        useless.swap(kept);  // so that what is kept is never more than what was once in use
      }
    }
    for (const Block& b : useless) munmap(b.data, b.size);
    return map(bytes, size);
  }

  static void give(void* data, size_t size) {
    if (!madvise(data, size, MADV_WIPEONFORK) && !madvise(data, size, MADV_FREE)) {
      const Hold hold;
      if (hold.mine) {
        blocks().push_back({data, size});
        return;
      }
    }
    munmap(data, size);
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };

  // The blocks for one thread, unless another has them. Nobody waits: a process may have been forked meanwhile.
  struct Hold {
    const bool mine = !busy.test_and_set(std::memory_order_acquire);
    ~Hold() {
      if (mine) busy.clear(std::memory_order_release);
    }
  };
  static inline std::atomic_flag busy;

  // Never destroyed: a tensor may outlive every static object.
  static std::vector<Block>& blocks() {
    static auto* const kept = new std::vector<Block>;
    return *kept;
  }

  static void* map(size_t bytes, size_t* size) {
    constexpr size_t kHuge = size_t(2) << 20;
    *size = (bytes + kHuge - 1) / kHuge * kHuge;
    void* const mapped = mmap(nullptr, *size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped), first = (begin + kHuge - 1) / kHuge * kHuge;
    if (first > begin) munmap(mapped, first - begin);
    if (first < begin + kHuge) munmap(reinterpret_cast<void*>(first + *size), begin + kHuge - first);
    void* const data = reinterpret_cast<void*>(first);
    madvise(data, *size, MADV_HUGEPAGE);  // a system without huge pages leaves ordinary ones
    return data;
  }
#else
  static void* take(size_t, size_t*) { return nullptr; }
  static void give(void*, size_t) {}
#endif
};

}  // namespace fastlm
