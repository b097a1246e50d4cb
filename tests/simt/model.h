// The execution model: a launch of blocks, blocks of warps, warps of 32 lanes, each lane running the
// kernel's function on a stack of its own, and the meetings that are the only order between lanes.
//
// A meeting is of the lanes that a mask names, of the threads of a block or of blocks of a launch.
// Who arrives deposits a Call; who arrives last checks that all made the same one, does what is to be
// done for all, and goes on; the others go on after it.
//
// Two schedulers implement arriving and waiting. Fibers (fibers.h) are lanes of one thread of the
// operating system that hand over to one another where they wait, in an order drawn from the seed.
// With SIMT_THREADS (threads.h) each lane is a thread, and a meeting orders those that it is of and no
// others, so that the thread sanitizer sees the races that a GPU would have.
#pragma once
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "names.h"
#include "products.h"
#include "races.h"

#ifdef SIMT_THREADS
#define SIMT_OWN thread_local
#else
#define SIMT_OWN
#endif
#define SIMT_HIDDEN __attribute__((visibility("hidden")))  // reached without a table

// Plain variables, set at each switch of fibers.
SIMT_HIDDEN inline SIMT_OWN uint3 threadIdx, blockIdx;
SIMT_HIDDEN inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace simt {

using Site = std::source_location;
#define SIMT_HERE ::simt::Site at = ::simt::Site::current()

// What a kernel did wrong; thrown by launch().
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What meetings are for; name_of() has them in words.
enum class Op : uint8_t {
  none, syncthreads, grid, syncwarp, shuffle, vote, load_matrix, mma, wgmma, wgmma_fence, wgmma_commit, wgmma_wait
};
const char* name_of(Op op);

struct Call {
  Op op = Op::none;
  uint32_t mask = 0;        // the lanes named, of a meeting of lanes
  void* operand = nullptr;  // what the lane brings and takes home
  Site at{};
};

#ifdef SIMT_THREADS
struct Meeting {
  std::atomic<uint32_t> arrived{0}, phase{0};
  uint32_t arrive(uint32_t share) { return arrived.fetch_add(share, std::memory_order_acq_rel) + share; }
};
#else
struct Meeting {
  uint32_t arrived = 0;
  uint32_t arrive(uint32_t share) { return arrived += share; }
};
#endif

struct Block;

// Of the lanes that one mask names.
struct LaneMeeting {
#ifdef SIMT_THREADS
  std::atomic<uint32_t> mask{0};
  bool take(uint32_t wanted) {
    uint32_t there = 0;
    return mask.compare_exchange_strong(there, wanted, std::memory_order_relaxed) || there == wanted;
  }
#else
  uint32_t mask = 0;
  bool take(uint32_t wanted) {
    if (!mask) mask = wanted;
    return mask == wanted;
  }
#endif
  Meeting meeting;
};

// One lane's share of an access that is counted.
enum class Memory : uint8_t { shared, global };
struct Access { const void* p; Site at; Memory memory; uint8_t bytes, lane; };

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0, present = 0;  // present: the lanes that the block has
  Call calls[32];                   // the last of each lane
  LaneMeeting meetings[64];         // the first of all lanes
#ifdef SIMT_THREADS
  std::atomic<uint32_t> ended{0};   // lanes that have returned from the kernel
#else
  uint32_t ended = 0;
  uint32_t ready = 0, first = 0;    // lanes that can run; the one to begin with
  bool down = false;                // and on to lower ones
  uint32_t barriers = 0;            // that its lanes have met at
#endif
  std::vector<Access> accesses;
  std::vector<Product> products;  // of its warpgroup that are under way
  uint32_t product_groups = 0;    // closed so far
  uint64_t started = 0;           // what tells the products so far from others
  bool fenced = false;            // since the last wait for products
};

// A copy from global to shared memory that is under way, in a group of its lane's.
struct Copy { void* to; const void* from; uint32_t group; Site at; };

struct Lane {
  Warp* warp = nullptr;
  uint3 index{};
  uint32_t bit = 0;  // 1 << index in the warp
  std::vector<Copy> copies;
  uint32_t groups = 0;           // closed so far
  void* atomic = nullptr;        // last accessed so
  bool fenced = false;           // a __threadfence stands before what comes
  std::vector<uint32_t> fences;  // for products: the block's barriers before each
  void* stack_pointer = nullptr;
  char* stack = nullptr;
};

struct Block {
  uint3 index;
  std::vector<Warp> warps;
  std::vector<Lane> lanes;
  Meeting meeting;
  unsigned char* shared = nullptr;
#ifndef SIMT_THREADS
  uint32_t ready = 0;        // warps with lanes that can run
  uint32_t barriers = 0;     // of all blocks so far, at the block's last
  uint32_t first = 0;        // the same at its start
  std::vector<Word> words;   // of `shared`
#endif
};

// Of the blocks that share a counter, each standing for its threads.
struct GridMeeting {
  std::atomic<uint32_t*> counter{nullptr};
  std::atomic<uint64_t> terms{0};  // round and number of blocks of those who wait, or 0
  Meeting meeting;
#ifndef SIMT_THREADS
  std::vector<Lane*> waiting;
#endif
};

struct Launch {
  dim3 grid, block;
  size_t shared;           // bytes
  bool together;
  void (*kernel)(void*);
  void* context;
  std::string name;
  std::vector<Block> blocks;  // that exist at this time
  std::vector<GridMeeting> meetings;
};

SIMT_HIDDEN inline SIMT_OWN Lane* self = nullptr;  // the lane that runs
SIMT_HIDDEN inline Launch* current = nullptr;      // under way

// What launchers see of the device: a small one, on which grids are divided as on a large one, with little
// work each. listing: launches are listed instead of run.
struct Gpu {
  int multiprocessors = 4;
  size_t shared_bytes = 99 * 1024;  // that a block may use
  bool tf32 = false;  // float32 is multiplied so
  bool warpgroups = false;  // whose products it has
  bool listing = false;
};
SIMT_HIDDEN inline Gpu gpu;

[[noreturn]] void fail(const std::string& what, Site at = {});
[[noreturn]] void fail_race(const Stamp& other, size_t word, Site at);
[[noreturn]] void fail_fence(const Stamp& write, size_t word, Site at);

// The calling lane waits until it is released from the meeting; the last to arrive releases the others.
#ifdef SIMT_THREADS
void wait(Meeting& meeting, uint32_t phase);
#else
void wait();
#endif
void release_lanes(Warp& warp, Meeting& meeting, uint32_t mask);
void release_block(Block& block);
void release_grid(GridMeeting& meeting, uint32_t blocks);

void check_lanes(const Warp& warp, uint32_t mask, const Call& mine);
// Counts what the lanes of a warp have accessed since the last time: all stand at the same place.
void flush_counts(Warp& warp);
SIMT_HIDDEN inline bool counting = false;

inline Meeting& meeting_of(Warp& warp, uint32_t mask, Site at) {
  if (mask == ~0u) return warp.meetings[0].meeting;
  for (int i = 1; i < 64; ++i)
    if (warp.meetings[i].take(mask)) return warp.meetings[i].meeting;
  fail("lanes of a warp meet under more than 63 masks", at);
}

#ifdef SIMT_THREADS
// While one lives, lanes that stop since another has failed keep what they brought to a meeting.
struct Performing {
  Performing();
  ~Performing();
};
#else
struct Performing { ~Performing() {} };
#endif

// A meeting of the lanes of the mask. perform(calls) is called once, by the last to arrive.
template <class Perform> void meet(const Call& mine, const Perform& perform) {
  Warp& warp = *self->warp;
  const uint32_t bit = self->bit, mask = mine.mask;
  if (!(mask & bit)) fail("the mask does not name the calling lane", mine.at);
  if (mask & ~warp.present) fail("the mask names a lane that the block does not have", mine.at);
  if (mask & warp.ended) fail("the mask names a lane that has returned from the kernel", mine.at);
  Meeting& meeting = meeting_of(warp, mask, mine.at);
  warp.calls[std::countr_zero(bit)] = mine;
#ifdef SIMT_THREADS
  const uint32_t phase = meeting.phase.load(std::memory_order_relaxed);
  if (meeting.arrive(bit) != mask) return wait(meeting, phase);
#else
  if (meeting.arrive(bit) != mask) return wait();
#endif
  {
    const Performing performing;
    check_lanes(warp, mask, mine);
    perform(warp.calls);
  }
  if (counting && mask == ~0u) flush_counts(warp);
  release_lanes(warp, meeting, mask);
}

void meet_block(Site at);
void meet_grid(uint32_t* counter, uint32_t round, uint32_t blocks, Site at);

// Runs kernel(context) for every thread of the grid; entry is the address of the function that it calls,
// for its name.
void run(dim3 grid, dim3 block, size_t shared, bool together, const void* entry, void (*kernel)(void*),
         void* context);

template <class Kernel>
void launch(dim3 grid, dim3 block, size_t shared, bool together, Kernel&& kernel, const void* entry = nullptr) {
  using K = std::remove_reference_t<Kernel>;
  run(grid, block, shared, together, entry, [](void* k) { (*static_cast<K*>(k))(); }, &kernel);
}

// ---- memory --------------------------------------------------------------------------------

// Counts a lane's share of its warp's access.
void count(Memory memory, const void* p, size_t bytes, Site at);
// A whole access of a warp: row addresses of ldmatrix.
void count_matrix(const void* const (&rows)[32], Site at);

#ifdef SIMT_THREADS
inline void check_race(const void*, size_t, bool, Site) {}
inline void check_fenced(const void*, size_t, Site) {}
inline void pass_warp_barrier() {}
#else
inline void pass_warp_barrier() { ++self->warp->barriers; }

// Of an access by the lane that runs.
inline void check_race(const void* p, size_t bytes, bool writes, Site at) {
  Block& block = *self->warp->block;
  const uint32_t fences = uint32_t(self->fences.size());
  const Stamp now{block.barriers, self->warp->barriers, uint32_t(self - block.lanes.data()), fences, at};
  const size_t first = size_t(static_cast<const unsigned char*>(p) - block.shared);
  for (size_t i = first / 4; i < (first + bytes + 3) / 4; ++i)
    if (const Stamp* const other = block.words[i].access(now, writes)) fail_race(*other, i, at);
}

// Of what a product reads: that between the last write and a barrier its thread has called fence_for_products.
inline void check_fenced(const void* p, size_t bytes, Site at) {
  Block& block = *self->warp->block;
  const size_t first = size_t(static_cast<const unsigned char*>(p) - block.shared);
  for (size_t i = first / 4; i < (first + bytes + 3) / 4; ++i) {
    const Stamp& write = block.words[i].write;
    if (write.block < block.first) continue;  // of a block before
    const std::vector<uint32_t>& fences = block.lanes[write.thread].fences;
    if (fences.size() <= write.fences || fences[write.fences] == block.barriers) fail_fence(write, i, at);
  }
}
#endif

inline bool inside_shared(const void* p, size_t bytes) {
  const unsigned char* const begin = self->warp->block->shared;
  const auto* const q = static_cast<const unsigned char*>(p);
  return q >= begin && q + bytes <= begin + current->shared;
}
inline void check_shared(const void* p, size_t bytes, Site at) {
  if (!inside_shared(p, bytes)) fail("access outside of the block's shared memory", at);
  if (uintptr_t(p) % bytes) fail("misaligned access of shared memory", at);
}
inline void check_global(const void* p, size_t bytes, Site at) {
  if (uintptr_t(p) % bytes) fail("misaligned access of global memory", at);
  if (inside_shared(p, 1)) fail("access of shared memory as global memory", at);
}

void start_product(Product&& x);
void commit_products(Site at);
void wait_for_products(uint32_t pending);  // at most so many groups stay under way

void start_copy(void* to, const void* from, bool valid, Site at);
void wait_for_copies(uint32_t pending);

}  // namespace simt
