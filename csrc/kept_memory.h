// Memory of large results. What malloc maps, or gives back when its top is free, is new memory the next time, whose
// pages the system clears before they are written: a cross-entropy waits as long for that as it computes, and a sixth
// of a training step goes by in page faults. So the memory of a freed result is kept for the next one, in huge pages.
// The system may take back all but what was freed last whenever it runs short (MADV_FREE, which takes as long as a
// seventh of what wrote the memory), and a forked process gets nothing that is kept (MADV_WIPEONFORK).
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>

#include <atomic>
#include <vector>
#endif

namespace fastlm {

class KeptMemory {
 public:
  static constexpr size_t kLeast = size_t(1) << 20;
  static constexpr size_t kHeld = size_t(256) << 20;  // of what is kept, not left to the system

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_WIPEONFORK) && defined(MADV_HUGEPAGE)
  // A block of at least so many bytes, aligned to a huge page; null where the system refuses. `size` is the
  // block's own.
  static void* take(size_t bytes, size_t* size) {
    Block found = take_kept(bytes);
    if (found.data) madvise(found.data, found.size, MADV_KEEPONFORK);
    else found = map(bytes);
    *size = found.size;
    const size_t now = used += found.size;
    for (size_t most = most_used; now > most && !most_used.compare_exchange_weak(most, now);) {}
    return found.data;
  }

  static void give(void* data, size_t size) {
    used -= size;
    std::vector<Block> surplus;
    if (madvise(data, size, MADV_WIPEONFORK)) surplus.push_back({data, size});
    else surplus = keep({data, size, true});
    for (const Block& b : surplus) munmap(b.data, b.size);
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t size = 0;
    bool held = false;
  };

  // The blocks for one thread, unless another has them. Nobody waits: a process may have been forked meanwhile.
  struct Hold {
    const bool mine = !busy.test_and_set(std::memory_order_acquire);
    ~Hold() {
      if (mine) busy.clear(std::memory_order_release);
    }
  };
  static inline std::atomic_flag busy;
  static inline std::atomic<size_t> used{0}, most_used{0};  // bytes in results, now and ever
  static inline size_t kept = 0;                            // bytes in blocks()

  // From that given first to that given last. Never destroyed: a tensor may outlive every static object.
  static std::vector<Block>& blocks() {
    static auto* const all = new std::vector<Block>;
    return *all;
  }

  // The smallest that fits, unless it is more than twice what is asked for; of equal ones that given last.
  static Block take_kept(size_t bytes) {
    const Hold hold;
    if (!hold.mine) return {};
    std::vector<Block>& all = blocks();
    auto best = all.end();
    for (auto b = all.begin(); b != all.end(); ++b)
      if (b->size >= bytes && b->size / 2 <= bytes && (best == all.end() || b->size <= best->size)) best = b;
    if (best == all.end()) return {};
    const Block found = *best;
    kept -= found.size;
    all.erase(best);
    return found;
  }

  // Returns what is too much then: half as much again is kept as was once in use, since a step's results are of several
  // sizes, in use one after the other. The last that were given stay held.
  static std::vector<Block> keep(Block b) {
    const Hold hold;
    if (!hold.mine) return {b};
    std::vector<Block>& all = blocks();
    all.push_back(b);
    kept += b.size;
    auto end = all.begin();
    for (; kept > most_used * 3 / 2; ++end) kept -= end->size;
    std::vector<Block> surplus(all.begin(), end);
    all.erase(all.begin(), end);
    size_t held = 0;
    for (auto i = all.rbegin(); i != all.rend(); ++i)
      if (i->held && (held += i->size) > kHeld) i->held = madvise(i->data, i->size, MADV_FREE) != 0;
    return surplus;
  }

  static Block map(size_t bytes) {
    constexpr size_t kHuge = size_t(2) << 20, kUnit = size_t(64) << 10;  // a multiple of every system's pages
    const size_t size = (bytes + kUnit - 1) / kUnit * kUnit;
    void* const mapped = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return {};
    const uintptr_t begin = reinterpret_cast<uintptr_t>(mapped), first = (begin + kHuge - 1) / kHuge * kHuge;
    if (first > begin) munmap(mapped, first - begin);
    if (first < begin + kHuge) munmap(reinterpret_cast<void*>(first + size), begin + kHuge - first);
    void* const data = reinterpret_cast<void*>(first);
    madvise(data, size, MADV_HUGEPAGE);  // a system without huge pages leaves ordinary ones
    return {data, size};
  }
#else
  static void* take(size_t, size_t*) { return nullptr; }
  static void give(void*, size_t) {}
#endif
};

}  // namespace fastlm
