// Races on a block's shared memory, whatever the order that lanes run in: two threads access a word, one of them
// writes, and no barrier of the block stands between. Lanes of a warp are ordered by __syncwarp too; shuffles, votes
// and matrix instructions order no memory. What goes through the primitives of device.cuh is looked at; the thread
// sanitizer sees all, but takes shuffles for an order.
#pragma once
#include <cstdint>
#include <source_location>

namespace simt {

// Who was there last, and between which barriers.
struct Stamp {
  uint32_t block = 0, warp = 0;  // barriers that had been: of all blocks of the program, of the warp
  uint32_t thread = 0;
  uint32_t fences = 0;  // that the thread had called for products
  std::source_location at{};

  bool unordered(const Stamp& now) const {
    if (block != now.block || thread == now.thread) return false;
    return thread / 32 != now.thread / 32 || warp == now.warp;
  }
};

// 4 bytes. Of those who read since the block's last barrier the last one is known, and whether others of its warp
// (since the warp's last) or other warps did.
struct Word {
  Stamp write, read;
  bool lanes = false, warps = false;

  // The access that now is in a race with, or null.
  const Stamp* access(const Stamp& now, bool writes) {
    if (write.unordered(now)) return &write;
    if (writes) {
      const bool here = read.block == now.block;
      if (read.unordered(now) || (here && (warps || (lanes && read.warp == now.warp)))) return &read;
      write = now;
      return nullptr;
    }
    if (read.block != now.block) lanes = warps = false;
    else if (read.thread / 32 != now.thread / 32) warps = true;
    else lanes = read.warp == now.warp && (lanes || read.thread != now.thread);
    read = now;
    return nullptr;
  }
};

}  // namespace simt
