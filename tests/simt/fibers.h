// Lanes as fibers: stacks of one thread of the operating system, which hand over to one another. A lane
// runs until it waits. The next is of the same warp as long as one there can run, else of a warp and a
// block drawn by lot, and a warp begins with a lane drawn by lot: what lacks a barrier sees another order
// than it was written for.
#pragma once
#include <sys/mman.h>

#include "model.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Keeps the registers that a called function must keep on the stack, leaves the stack pointer in *save and
// goes on from that of `load`.
extern "C" void simt_switch(void** save, void* load);
extern "C" [[noreturn]] void simt_lane();

#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

// A stack from which simt_switch goes to simt_lane.
static void* simt_new_stack(char* top) {
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // simt_lane's return address: it does not return
  *--sp = reinterpret_cast<void*>(&simt_lane);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, . - simt_switch
)");

static void* simt_new_stack(char* top) {
  void** sp = reinterpret_cast<void**>(top - 160);
  std::memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&simt_lane);  // x30
  return sp;
}
#else
#error "the fibers of tests/simt know x86-64 and aarch64; elsewhere define SIMT_THREADS"
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kPage = 4096;

std::vector<char*> stacks;  // of past launches, for the next
void* launcher;             // its stack pointer while lanes run
std::exception_ptr failure;
uint64_t left;              // lanes that have not returned from the kernel
uint32_t barriers;          // of blocks, and blocks, since the start

char* take_stack() {
  if (!stacks.empty()) {
    char* const stack = stacks.back();
    stacks.pop_back();
    return stack;
  }
  void* const p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  mprotect(p, kPage, PROT_NONE);  // where the stack would overflow
  return static_cast<char*>(p);
}

#ifdef __SANITIZE_ADDRESS__
const void* launcher_bottom;
size_t launcher_bytes;
bool from_launcher;

// The address sanitizer is told of each change: where it goes, and on arrival that it is there.
void leave_for(const char* stack) {
  __sanitizer_start_switch_fiber(nullptr, stack ? stack : launcher_bottom, stack ? kStackBytes : launcher_bytes);
}
void arrive() {
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (std::exchange(from_launcher, false)) launcher_bottom = bottom, launcher_bytes = bytes;
}
#else
void leave_for(const char*) {}
void arrive() {}
#endif

// Leaves one stack for another, whose memory begins at `stack`; null for the launcher's.
void change_stack(void** save, void* load, const char* stack) {
  leave_for(stack);
  simt_switch(save, load);
  arrive();
}

void enter(Lane& next) {
  self = &next;
  threadIdx = next.index;
  blockIdx = next.warp->block->index;
}

int some_bit(uint32_t x) {
  for (uint32_t skip = draw(uint32_t(std::popcount(x))); skip; --skip) x &= x - 1;
  return std::countr_zero(x);
}

// The lane to run next, or null if none can.
Lane* next_lane() {
  Warp* warp = self->warp;
  if (!warp->ready) {
    Block* block = warp->block;
    if (!block->ready) {
      std::vector<Block>& blocks = current->blocks;
      const size_t from = draw(uint32_t(blocks.size()));
      size_t i = 0;
      while (i < blocks.size() && !blocks[(from + i) % blocks.size()].ready) ++i;
      if (i == blocks.size()) return nullptr;
      block = &blocks[(from + i) % blocks.size()];
    }
    warp = &block->warps[size_t(some_bit(block->ready))];
  }
  const uint32_t before = warp->down ? warp->ready & (~0u >> (31 - warp->first)) : warp->ready & (~0u << warp->first);
  const uint32_t among = before ? before : warp->ready;
  const int lane = warp->down ? 31 - std::countl_zero(among) : std::countr_zero(among);
  warp->ready &= ~(1u << lane);
  if (!warp->ready) warp->block->ready &= ~(1u << warp->index);
  return &warp->block->lanes[32 * warp->index + uint32_t(lane)];
}

void make_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.ready) warp.block->ready |= 1u << warp.index;
}

// All lanes of the block, in a new order; but for the one that runs.
void make_ready(Block& block) {
  for (Warp& warp : block.warps) {
    warp.first = draw(32);
    warp.down = draw(2);
    make_ready(warp, self && self->warp == &warp ? warp.present & ~self->bit : warp.present);
  }
}

void prepare(Block& block, uint64_t index) {
  begin(block, index);
  block.first = block.barriers = ++barriers;
  block.words.resize((current->shared + 3) / 4);
  self = nullptr;
  make_ready(block);
  for (size_t i = 0; i < block.lanes.size(); ++i) {
    Lane& lane = block.lanes[i];
    if (!lane.stack) lane.stack = take_stack();
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(lane.stack + kPage, kStackBytes - kPage);
#endif
    // Apart by a few cache lines: the same variable of 32 lanes would otherwise fall into one set.
    lane.stack_pointer = simt_new_stack(lane.stack + kStackBytes - i % 32 * 320);
  }
  left += block.lanes.size();
}

// Runs the blocks that are prepared until all have returned or one has failed.
void run_prepared() {
  Block& block = current->blocks[draw(uint32_t(current->blocks.size()))];
  self = &block.lanes[0];
  Lane* const first = next_lane();
  enter(*first);
#ifdef __SANITIZE_ADDRESS__
  from_launcher = true;
#endif
  change_stack(&launcher, first->stack_pointer, first->stack);
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

void schedule(Launch& launch) {
  const uint64_t blocks = volume(launch.grid);
  launch.blocks = std::vector<Block>(launch.together ? blocks : 1);
  left = 0;
  struct Stacks {
    Launch& launch;
    ~Stacks() {
      for (Block& block : launch.blocks)
        for (Lane& lane : block.lanes)
          if (lane.stack) stacks.push_back(lane.stack);
    }
  } give_back{launch};
  if (launch.together) {
    for (uint64_t i = 0; i < blocks; ++i) prepare(launch.blocks[i], i);
    run_prepared();
    for (Block& block : launch.blocks) end(block);
    return;
  }
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) {
    const uint32_t j = draw(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (uint32_t i : order) {
    prepare(launch.blocks[0], i);
    run_prepared();
    end(launch.blocks[0]);
  }
}

}  // namespace

void wait() {
  Lane* const from = self;
  Lane* const next = next_lane();
  if (!next) fail(describe(), from->warp->calls[std::countr_zero(from->bit)].at);
  enter(*next);
  change_stack(&from->stack_pointer, next->stack_pointer, next->stack);
}

void release_lanes(Warp& warp, Meeting& meeting, uint32_t mask) {
  meeting.arrived = 0;
  make_ready(warp, mask & ~self->bit);
}

void release_block(Block& block) {
  block.meeting.arrived = 0;
  block.barriers = ++barriers;
  make_ready(block);
}

void release_grid(GridMeeting& meeting, uint32_t) {
  meeting.meeting.arrived = 0;
  for (Lane* lane : meeting.waiting) make_ready(*lane->warp, lane->bit);
  meeting.waiting.clear();
}

}  // namespace simt

// What a fiber runs. It never returns: the last one to end, or the first to fail, goes to the launcher.
extern "C" [[noreturn]] void simt_lane() {
  using namespace simt;
  arrive();
  try {
    run_lane();
  } catch (...) {
    failure = std::current_exception();
  }
  Lane* next = nullptr;
  if (!failure) {
    self->warp->ended |= self->bit;
    if (--left && !(next = next_lane())) {
      try {
        fail(describe());
      } catch (...) {
        failure = std::current_exception();
      }
    }
  }
  void* gone;
  if (next) enter(*next);
  change_stack(&gone, next ? next->stack_pointer : launcher, next ? next->stack : nullptr);
  __builtin_unreachable();
}
