// A loop over threads of our own, started and joined in each call: the thread sanitizer sees every hand-over,
// which it cannot in an OpenMP runtime that was built without it. For tests.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>

#include "kernels.h"

namespace fastlm {

// As Pool's parallel_for, on up to so many threads.
inline void run_on_own_threads(int threads, int64_t n, int64_t grain, RangeFn f, void* ctx) {
  static thread_local bool inside = false;
  const int64_t chunks = std::max<int64_t>(1, n / std::max<int64_t>(grain, 1));
  const int64_t team_size = inside ? 1 : std::min<int64_t>(threads, chunks);
  const int64_t chunk = (n + team_size - 1) / team_size;
  std::vector<std::thread> team;
  for (int64_t begin = 0; begin < n; begin += chunk)
    team.emplace_back([=] {
      inside = true;
      f(begin, std::min(begin + chunk, n), ctx);
    });
  for (std::thread& t : team) t.join();
}

}  // namespace fastlm
