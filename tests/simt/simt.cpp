// The device behind simt.h: launches, what is checked of them and of meetings, and the words for errors.
// A program has it once. SIMT_THREADS chooses the scheduler.
#include "simt.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "count.h"

namespace simt {
namespace {

constexpr size_t kGuard = 64;            // bytes behind a block's shared memory
constexpr unsigned char kPoison = 0xff;  // a NaN of every type

uint64_t random_state = 1;

// In [0, n), n below 2^32: xorshift.
uint32_t draw(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t((random_state >> 32) * n >> 32);
}

void seed(uint64_t x) { random_state = x * 0x9E3779B97F4A7C15u | 1; }

const bool seeded = [] {
  const char* const x = std::getenv("FASTLM_SIMT_SEED");
  seed(x ? std::strtoull(x, nullptr, 10) : 0);
  return true;
}();

uint64_t volume(dim3 x) { return uint64_t(x.x) * x.y * x.z; }

uint3 place(uint64_t i, dim3 in) {
  return {unsigned(i % in.x), unsigned(i / in.x % in.y), unsigned(i / in.x / in.y)};
}

std::string words(uint3 x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

std::string words(Site at) {
  const char* const slash = std::strrchr(at.file_name(), '/');
  return std::string(slash ? slash + 1 : at.file_name()) + ":" + std::to_string(at.line());
}

std::string words(const Call& call) {
  std::string s = name_of(call.op);
  char mask[32];
  std::snprintf(mask, sizeof(mask), " of lanes %08x", call.mask);
  return s + (call.mask ? mask : "") + " (" + words(call.at) + ")";
}

bool same(const Call& a, const Call& b) {
  if (a.op != b.op || a.mask != b.mask) return false;
  if (!std::memcmp(&a.at, &b.at, sizeof(Site))) return true;
  return a.at.line() == b.at.line() && !std::strcmp(a.at.file_name(), b.at.file_name());
}

// The kernel's name where the function has one that can be looked up.
std::string name_of(const void* entry) {
  Dl_info info;
  if (!entry || !dladdr(entry, &info) || !info.dli_sname || info.dli_saddr != entry) return "kernel";
  const std::unique_ptr<char, void (*)(void*)> readable(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr), std::free);
  std::string name = readable ? readable.get() : info.dli_sname;
  if (const size_t end = name.rfind('('); end != std::string::npos) name.resize(end);
  for (const std::string word : {"void ", "fastlm::cuda::", "(anonymous namespace)::"})
    for (size_t i; (i = name.find(word)) != std::string::npos;) name.erase(i, word.size());
  return name;
}

std::string listed;
std::set<const void*> ran;  // kernels, since the start

std::string mangled_name_of(const void* entry) {
  Dl_info info{};
  dladdr(entry, &info);
  return info.dli_sname ? info.dli_sname : "?";
}

// A line: the kernel's mangled name, threads of a block, bytes of shared memory.
void list(const void* entry, uint64_t threads, size_t shared) {
  listed += mangled_name_of(entry) + '\t' + std::to_string(threads) + '\t' + std::to_string(shared) + '\n';
}

// Where the threads of the blocks that exist stand, when none of them can go on.
std::string describe() {
  std::map<std::string, int> states;
  for (const Block& block : current->blocks)
    for (const Lane& lane : block.lanes) {
      const bool ended = lane.warp->ended & lane.bit;
      const Call& call = lane.warp->calls[std::countr_zero(lane.bit)];
      ++states[ended ? "returned from the kernel" : "waiting at " + words(call)];
    }
  std::string s = "threads wait for others that do not come:";
  for (const auto& [state, threads] : states)
    s += (s.back() == ':' ? " " : ", ") + std::to_string(threads) + " " + state;
  return s;
}

void begin(Block& block, uint64_t index) {
  const uint32_t threads = uint32_t(volume(current->block));
  block.index = place(index, current->grid);
  block.warps = std::vector<Warp>((threads + 31) / 32);
  block.lanes.resize(threads);
  for (uint32_t w = 0; w < block.warps.size(); ++w) {
    block.warps[w].block = &block;
    block.warps[w].index = w;
    block.warps[w].present = threads - 32 * w >= 32 ? ~0u : (1u << threads % 32) - 1;
  }
  for (uint32_t i = 0; i < threads; ++i) {
    Lane& lane = block.lanes[i];
    lane.warp = &block.warps[i / 32];
    lane.index = place(i, current->block);
    lane.bit = 1u << i % 32;
    lane.copies.clear();
    lane.groups = 0;
    lane.atomic = nullptr;
    lane.fenced = false;
    lane.fences.clear();
  }
#ifdef __SANITIZE_ADDRESS__
  constexpr size_t kBehind = 0;  // the sanitizer's own guard stands there
#else
  constexpr size_t kBehind = kGuard;
#endif
  if (!block.shared) {
    void* p = nullptr;
    if (posix_memalign(&p, 1024, current->shared + kBehind)) throw std::bad_alloc();
    block.shared = static_cast<unsigned char*>(p);
  }
  std::memset(block.shared, kPoison, current->shared + kBehind);
}

// The four warps of a warpgroup start the same products.
constexpr const char* kWarpsDiffer = "warps of a warpgroup have started different products";
bool warps_differ(const Block& block) {
  return std::any_of(block.warps.begin(), block.warps.end(), [&](const Warp& warp) {
    return warp.started != block.warps[warp.index / 4 * 4].started;
  });
}

// When all threads of the block have returned.
void end(Block& block) {
  if (warps_differ(block)) throw Error("simt: " + current->name + ": block " + words(block.index) + ": " + kWarpsDiffer);
  if (counting)
    for (Warp& warp : block.warps) flush_counts(warp);
#ifndef __SANITIZE_ADDRESS__
  for (size_t i = 0; i < kGuard; ++i)
    if (block.shared[current->shared + i] != kPoison)
      throw Error("simt: " + current->name + ": block " + words(block.index) +
                  " has written behind the end of its shared memory");
#endif
}

void run_lane() {
  current->kernel(current->context);
  if (!self->copies.empty()) fail("returns with copies under way that it never waited for");
  if (!self->warp->products.empty()) fail("returns with products under way that it never waited for");
}

}  // namespace

const char* name_of(Op op) {
  constexpr const char* kNames[] = {"nothing", "__syncthreads", "grid_barrier", "__syncwarp",
                                    "a shuffle", "a vote", "ldmatrix", "mma",
                                    "wgmma", "wgmma_fence", "wgmma_commit", "wgmma_wait"};
  return kNames[int(op)];
}

void fail(const std::string& what, Site at) {
  throw Error("simt: " + current->name + ": block " + words(self->warp->block->index) + ", thread " +
              words(self->index) + ": " + what + (at.line() ? " (" + words(at) + ")" : ""));
}

void fail_race(const Stamp& other, size_t word, Site at) {
  fail("races with thread " + words(self->warp->block->lanes[other.thread].index) + " (" + words(other.at) +
           ") for word " + std::to_string(word) + " of shared memory", at);
}

void fail_fence(const Stamp& write, size_t word, Site at) {
  fail("a product reads word " + std::to_string(word) + " of shared memory, which thread " +
           words(self->warp->block->lanes[write.thread].index) + " has written (" + words(write.at) +
           ") without fence_for_products before a barrier", at);
}

void check_lanes(const Warp& warp, uint32_t mask, const Call& mine) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (!same(warp.calls[lane], mine))
      fail("lanes diverge: this one is at " + words(mine) + ", lane " + std::to_string(lane) + " at " +
               words(warp.calls[lane]),
           mine.at);
  }
}

namespace {

void check_block(const Block& block, const Call& mine) {
  for (const Lane& lane : block.lanes) {
    const Call& other = lane.warp->calls[std::countr_zero(lane.bit)];
    if (!same(other, mine))
      fail("threads diverge: this one is at " + words(mine) + ", thread " + words(lane.index) + " at " +
               words(other),
           mine.at);
  }
  if (warps_differ(block)) fail(kWarpsDiffer, mine.at);
}

// Whether this thread is the block's last at a meeting; the others return when it has released them.
bool arrives_last(Block& block) {
#ifdef SIMT_THREADS
  const uint32_t phase = block.meeting.phase.load(std::memory_order_relaxed);
  if (block.meeting.arrive(1) == block.lanes.size()) return true;
  wait(block.meeting, phase);
#else
  if (block.meeting.arrive(1) == block.lanes.size()) return true;
  wait();
#endif
  return false;
}

}  // namespace

void meet_block(Site at) {
  Warp& warp = *self->warp;
  Block& block = *warp.block;
  const Call& mine = warp.calls[std::countr_zero(self->bit)] = {Op::syncthreads, 0, nullptr, at};
  if (!arrives_last(block)) return;
  check_block(block, mine);
  if (counting)
    for (Warp& w : block.warps) flush_counts(w);
  release_block(block);
}

// The last thread of a block to arrive meets the other blocks, then releases its own.
void meet_grid(uint32_t* counter, uint32_t round, uint32_t blocks, Site at) {
  if (!current->together) fail("grid_barrier in a launch whose blocks do not run together", at);
  Warp& warp = *self->warp;
  Block& block = *warp.block;
  struct Operand { uint32_t* counter; uint64_t terms; } own{counter, uint64_t(round) << 32 | blocks};
  const Call& mine = warp.calls[std::countr_zero(self->bit)] = {Op::grid, 0, &own, at};
  if (!arrives_last(block)) return;
  check_block(block, mine);
  for (const Lane& lane : block.lanes) {
    const auto& x = *static_cast<Operand*>(lane.warp->calls[std::countr_zero(lane.bit)].operand);
    if (x.counter != counter || x.terms != own.terms) fail("threads of a block meet on other terms", at);
  }
  if (counting)
    for (Warp& w : block.warps) flush_counts(w);

  // Nothing here orders blocks that meet at different counters.
  GridMeeting* meeting = nullptr;
  for (GridMeeting& m : current->meetings) {
    uint32_t* there = nullptr;
    if (m.counter.compare_exchange_strong(there, counter, std::memory_order_relaxed) || there == counter) {
      meeting = &m;
      break;
    }
  }
  if (!meeting) fail("more counters of grid_barrier than blocks", at);
  uint64_t terms = 0;
  if (!meeting->terms.compare_exchange_strong(terms, own.terms, std::memory_order_relaxed) && terms != own.terms)
    fail("blocks meet at one counter in different rounds, or as different numbers of blocks", at);
#ifdef SIMT_THREADS
  const uint32_t grid_phase = meeting->meeting.phase.load(std::memory_order_relaxed);
  if (meeting->meeting.arrive(1) != blocks) {
    wait(meeting->meeting, grid_phase);
    return release_block(block);
  }
#else
  if (meeting->meeting.arrive(1) != blocks) {
    meeting->waiting.push_back(self);
    wait();
    return release_block(block);
  }
#endif
  if (*counter != blocks * round)
    fail("the barrier's counter is " + std::to_string(*counter) + " where round " + std::to_string(round) +
             " of " + std::to_string(blocks) + " blocks ends",
         at);
  *counter += blocks;
  meeting->terms.store(0, std::memory_order_relaxed);
  release_grid(*meeting, blocks);
  release_block(block);
}

void start_copy(void* to, const void* from, bool valid, Site at) {
  check_shared(to, 16, at);
  if (uintptr_t(from) % 16) fail("the source of a copy is misaligned", at);
  if (counting) count(Memory::shared, to, 16, at);
  if (counting && valid) count(Memory::global, from, 16, at);
  check_race(to, 16, true, at);
  std::memset(to, kPoison, 16);
  self->copies.push_back({to, valid ? from : nullptr, self->groups, at});
}

void wait_for_copies(uint32_t pending) {
  std::vector<Copy>& copies = self->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group + pending < self->groups; ++done) {
    const Copy& x = copies[done];
    check_race(x.to, 16, true, x.at);
    x.from ? std::memcpy(x.to, x.from, 16) : std::memset(x.to, 0, 16);
  }
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(done));
}

// ---- products of warpgroups ----------------------------------------------------------------

void start_product(Product&& x) {
  Warp& warp = *self->warp;
  Block& block = *warp.block;
  if (warp.index / 4 * 4 + 4 > block.warps.size()) fail("part of a warpgroup multiplies", x.at);
  if (!warp.fenced) fail("a product without wgmma_fence since the last wait", x.at);
  if (x.b >> 62 != 1 || x.b >> 46 & 0xffff || x.b >> 30 & 3 || x.b >> 14 & 3)
    fail("a descriptor of another kind than rows of 128 bytes that are swizzled", x.at);
  if (x.b & 0x38) fail("rows that don't begin at a multiple of 1024 bytes", x.at);
  x.each_chunk([&](uint32_t offset) {
    check_shared(block.shared + offset, 16, x.at);
    check_race(block.shared + offset, 16, false, x.at);
    check_fenced(block.shared + offset, 16, x.at);
  });
  const auto chains = [&](const Product& other) { return other.c[0] == x.c[0]; };
  const size_t size = 4 * size_t(x.tiles);
  if (!x.add) x.before.assign(32 * size, 0);
  else if (std::none_of(warp.products.begin(), warp.products.end(), chains))
    for (float* c : x.c) x.before.insert(x.before.end(), c, c + size);
  for (float* c : x.c) std::fill(c, c + size, std::bit_cast<float>(kUnderWay));
  for (uint64_t fact : {x.b, uint64_t(x.transposed), uint64_t(x.add), uint64_t(x.tiles), uint64_t(x.at.line())})
    warp.started = (warp.started ^ fact) * 0x9E3779B97F4A7C15u + 1;
  x.group = warp.product_groups;
  warp.products.push_back(std::move(x));
}

void commit_products(Site at) {
  Warp& warp = *self->warp;
  if (warp.products.empty() || warp.products.back().group != warp.product_groups) fail("a group without products", at);
  ++warp.product_groups;
}

void wait_for_products(uint32_t pending) {
  Warp& warp = *self->warp;
  warp.fenced = false;
  std::vector<Product>& all = warp.products;
  size_t done = 0;
  for (; done < all.size() && all[done].group + pending < warp.product_groups; ++done) {
    Product& x = all[done];
    x.each_chunk([&](uint32_t offset) { check_race(warp.block->shared + offset, 16, false, x.at); });
    const uint32_t size = 4 * uint32_t(x.tiles);
    const auto each = [&](const auto& f) {  // f(lane, number, row, column)
      for (uint32_t lane = 0; lane < 32; ++lane)
        for (uint32_t i = 0; i < size; ++i) f(lane, i, lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + 2 * (lane % 4) + i % 2);
    };
    alignas(32) float sums[16][128];
    each([&](uint32_t lane, uint32_t i, uint32_t row, uint32_t n) { sums[row][n] = x.before[lane * size + i]; });
    each([&](uint32_t lane, uint32_t i, uint32_t, uint32_t) {
      if (std::bit_cast<uint32_t>(x.c[lane][i]) != kUnderWay || std::memcmp(x.a[lane], x.words[lane], 16))
        fail("registers of a product under way have been written", x.at);
    });
    x.make(x, warp.block->shared, sums);
    const auto next = std::find_if(all.begin() + ptrdiff_t(done) + 1, all.end(),
                                   [&](const Product& other) { return other.c[0] == x.c[0]; });
    if (next != all.end() && next->add) next->before.resize(32 * size);
    each([&](uint32_t lane, uint32_t i, uint32_t row, uint32_t n) {
      if (next == all.end()) x.c[lane][i] = sums[row][n];
      else if (next->add) next->before[lane * size + i] = sums[row][n];
    });
  }
  all.erase(all.begin(), all.begin() + ptrdiff_t(done));
}

}  // namespace simt

#ifdef SIMT_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace simt {

void run(dim3 grid, dim3 block, size_t shared, bool together, const void* entry, void (*kernel)(void*),
         void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Launch launch{grid, block, shared, together, kernel, context, name_of(entry), {}, {}};
  launch.meetings = std::vector<GridMeeting>(together ? volume(grid) : 0);
  const auto require = [&](bool holds, const char* what) {
    if (!holds) throw Error("simt: " + launch.name + ": " + what);
  };
  require(volume(block) >= 1 && volume(block) <= 1024, "a block has 1 to 1024 threads");
  require(shared <= gpu.shared_bytes, "more shared memory than a block can have here");
  require(grid.x < 1u << 31 && grid.y <= 65535 && grid.z <= 65535, "the grid is too large");
  if (!volume(grid)) return;
  if (gpu.listing) return list(entry, volume(block), shared);
  ran.insert(entry);

  struct Scope {
    explicit Scope(Launch& launch) {
      current = &launch;
      gridDim = launch.grid;
      blockDim = launch.block;
    }
    ~Scope() {
      for (Block& b : current->blocks) std::free(b.shared);
      current = nullptr;
      self = nullptr;
    }
  } scope(launch);
  schedule(launch);
}

}  // namespace simt

SIMT_API void simt_seed(uint64_t seed) { simt::seed(seed); }

// From now on launchers see such a GPU; or that of the start, if it has no multiprocessors.
SIMT_API void simt_gpu(int multiprocessors, size_t shared_bytes, bool tf32, bool warpgroups) {
  simt::gpu = multiprocessors ? simt::Gpu{multiprocessors, shared_bytes, tf32, warpgroups} : simt::Gpu{};
}

// From now on launchers see such a GPU, and their launches are listed; simt_listed() ends that.
SIMT_API void simt_list(int multiprocessors, size_t shared_bytes, bool tf32, bool warpgroups) {
  simt::listed.clear();
  simt::gpu = {multiprocessors, shared_bytes, tf32, warpgroups, true};
}
SIMT_API const char* simt_listed() {
  simt::gpu = {};
  return simt::listed.c_str();
}

// The mangled name of each kernel that has run, a line each.
SIMT_API const char* simt_ran() {
  static std::string names;
  names.clear();
  for (const void* entry : simt::ran) names += simt::mangled_name_of(entry) + '\n';
  return names.c_str();
}
