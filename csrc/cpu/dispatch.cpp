// Picks the ISA once: the widest that this CPU runs, or the one that FASTLM_ISA names.
#include "dispatch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

// FASTLM_FOR_EACH_ISA(X) is defined by setup.py: X(generic) X(avx2) ...
#define FASTLM_DECLARE(name)           \
  namespace fastlm::name {             \
  void fill(AttentionKernels&);        \
  void fill(CrossEntropyKernels&);     \
  void fill(GruKernels&);              \
  void fill(LinearCrossEntropyKernels&); \
  void fill(PeakKernels&);             \
  }
FASTLM_FOR_EACH_ISA(FASTLM_DECLARE)

namespace fastlm {
namespace {

namespace runs_here {
[[maybe_unused]] bool generic() { return true; }
[[maybe_unused]] bool neon() { return true; }  // built on 64-bit Arm only, where it is the base
#if defined(__x86_64__)
[[maybe_unused]] bool avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool wide() { return avx2(); }  // 64-byte vectors on AVX2, for tests
[[maybe_unused]] bool avx512() {
  return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool avx512_bf16() { return avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
}  // namespace runs_here

struct Registry {
  Kernels table[8] = {};
  int count = 0;
  std::atomic<const Kernels*> current{nullptr};

  Registry() {
// Even fill() is made of its ISA's instructions: it is called only where these run.
#define FASTLM_FILL(name)                                    \
  table[count].isa = #name;                                  \
  table[count].runs_here = runs_here::name;                  \
  if (runs_here::name()) {                                   \
    fastlm::name::fill(table[count].attention);              \
    fastlm::name::fill(table[count].cross_entropy);          \
    fastlm::name::fill(table[count].gru);                    \
    fastlm::name::fill(table[count].linear_cross_entropy);   \
    fastlm::name::fill(table[count].peak);                   \
  }                                                          \
  ++count;
    FASTLM_FOR_EACH_ISA(FASTLM_FILL)
    const char* wanted = std::getenv("FASTLM_ISA");  // fastlm/_C.py reports one that is not there
    for (int i = 0; i < count; ++i)
      if (table[i].runs_here() && std::strcmp(table[i].isa, "wide")) current = &table[i];
    for (int i = 0; wanted && i < count; ++i)
      if (table[i].runs_here() && !std::strcmp(table[i].isa, wanted)) current = &table[i];
  }
};

Registry& registry() {
  static Registry r;
  return r;
}

}  // namespace

const Kernels& kernels() { return *registry().current.load(std::memory_order_relaxed); }

const Kernels* all_kernels(int* count) {
  *count = registry().count;
  return registry().table;
}

void use_kernels(const Kernels& k) { registry().current = &k; }

#if defined(FASTLM_OWN_THREADS)
// Threads of our own, started and joined in each call: the thread sanitizer sees every hand-over,
// which it cannot in an OpenMP runtime that was built without it.
Pool torch_pool() {
  static thread_local bool inside = false;
  return {[](int64_t n, int64_t grain, RangeFn f, void* ctx) {
            const int64_t chunks = std::max<int64_t>(1, n / std::max<int64_t>(grain, 1));
            const int64_t threads = inside ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), chunks);
            const int64_t chunk = (n + threads - 1) / threads;
            std::vector<std::thread> team;
            for (int64_t begin = 0; begin < n; begin += chunk)
              team.emplace_back([=] {
                inside = true;
                f(begin, std::min(begin + chunk, n), ctx);
              });
            for (auto& t : team) t.join();
          },
          int(torch::stable::get_num_threads())};
}
#else
Pool torch_pool() {
  return {[](int64_t n, int64_t grain, RangeFn f, void* ctx) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, f, ctx));
          },
          int(torch::stable::get_num_threads())};
}
#endif

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
    const size_t size = (bytes + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(64, size);
    b.size = b.data ? size : 0;
    if (!b.data) throw std::bad_alloc();
  }
  return b.data;
}

}  // namespace fastlm
