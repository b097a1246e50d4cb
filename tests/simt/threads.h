// Lanes as threads of the operating system, for the thread sanitizer. Whoever arrives and waits uses the
// meeting's own words alone: bookkeeping is relaxed, so that it orders nothing. Two teams of threads share
// the blocks of a launch: those of one team follow each other, those of two are in no order.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <thread>

#include "model.h"

namespace simt {
namespace {

struct Stopped {};  // another lane has failed

std::atomic<uint32_t> running;  // lanes that do not wait and have not ended
std::atomic<bool> stopped;
std::atomic<uint32_t> performers;
std::mutex first_failure;
std::exception_ptr failure;

// By the system call: what the standard library waits with would order those who wait.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  const timespec most{0, 20'000'000};  // to see `stopped`
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, &most, nullptr, 0);
}
void wake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Sees what those who wait have written, to describe it.
void see_all() {
  for (Block& block : current->blocks) {
    block.meeting.arrived.load(std::memory_order_acquire);
    for (Warp& warp : block.warps)
      for (LaneMeeting& m : warp.meetings) m.meeting.arrived.load(std::memory_order_acquire);
  }
  for (GridMeeting& m : current->meetings) m.meeting.arrived.load(std::memory_order_acquire);
}

void release(Meeting& meeting, uint32_t others) {
  meeting.arrived.store(0, std::memory_order_relaxed);
  running.fetch_add(others, std::memory_order_relaxed);
  meeting.phase.fetch_add(1, std::memory_order_release);
  wake(meeting.phase);
}

void run_thread(Lane& lane) {
  self = &lane;
  threadIdx = lane.index;
  blockIdx = lane.warp->block->index;
  run_lane();
  lane.warp->ended.fetch_or(lane.bit, std::memory_order_relaxed);
}

void schedule(Launch& launch) {
  const uint64_t blocks = volume(launch.grid), threads = volume(launch.block);
  launch.blocks = std::vector<Block>(blocks);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    begin(launch.blocks[i], i);
    const uint64_t j = draw(uint32_t(i + 1));
    order[i] = order[j];
    order[j] = i;
  }
  const uint64_t teams = launch.together ? blocks : std::min<uint64_t>(blocks, 2), workers = teams * threads;
  running = uint32_t(workers);
  stopped = false;
  std::atomic<uint64_t> ended = 0;
  const auto work = [&](uint64_t worker) {
    try {
      for (uint64_t i = worker / threads; i < blocks; i += teams)
        run_thread(launch.blocks[order[i]].lanes[worker % threads]);
      ended.fetch_add(1);
      if (running.fetch_sub(1) == 1 && ended != workers && !stopped) {
        see_all();
        fail(describe());
      }
    } catch (const Stopped&) {
    } catch (...) {
      const std::lock_guard lock(first_failure);
      if (!failure) failure = std::current_exception();
      stopped = true;
    }
  };
  std::vector<std::thread> all;
  for (uint64_t i = 0; i < workers; ++i) all.emplace_back(work, i);
  for (std::thread& t : all) t.join();
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  for (Block& block : launch.blocks) end(block);
}

}  // namespace

Performing::Performing() {
  performers.fetch_add(1, std::memory_order_relaxed);
  if (!stopped.load(std::memory_order_relaxed)) return;
  performers.fetch_sub(1, std::memory_order_relaxed);
  throw Stopped{};
}
Performing::~Performing() { performers.fetch_sub(1, std::memory_order_relaxed); }

void wait(Meeting& meeting, uint32_t phase) {
  if (running.fetch_sub(1, std::memory_order_relaxed) == 1 && !stopped.load(std::memory_order_relaxed)) {
    see_all();
    fail(describe(), self->warp->calls[std::countr_zero(self->bit)].at);
  }
  while (meeting.phase.load(std::memory_order_acquire) == phase) {
    if (stopped.load(std::memory_order_relaxed)) {
      while (performers.load(std::memory_order_relaxed)) std::this_thread::yield();
      throw Stopped{};
    }
    sleep_while(meeting.phase, phase);
  }
}

void release_lanes(Warp&, Meeting& meeting, uint32_t mask) {
  release(meeting, uint32_t(std::popcount(mask)) - 1);
}
void release_block(Block& block) { release(block.meeting, uint32_t(block.lanes.size()) - 1); }
void release_grid(GridMeeting& meeting, uint32_t blocks) { release(meeting.meeting, blocks - 1); }

}  // namespace simt
