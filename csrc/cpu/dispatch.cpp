// Picks the ISA once: the widest that this CPU runs, or the one that FASTLM_ISA names.
#include "dispatch.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#ifdef FASTLM_OWN_THREADS
#include "own_threads.h"
#endif

// FASTLM_FOR_EACH_ISA(X) is defined by setup.py: X(generic) X(avx2) ...
#define FASTLM_DECLARE(name)           \
  namespace fastlm::name {             \
  void fill(ActivationKernels&);       \
  void fill(AttentionKernels&);        \
  void fill(CrossEntropyKernels&);     \
  void fill(GruKernels&);              \
  void fill(LinearKernels&);           \
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
[[maybe_unused]] bool avx512_model() { return avx2(); }  // avx512_model.h
[[maybe_unused]] bool avx512_bf16_model() { return avx2(); }
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
    fastlm::name::fill(table[count].activation);             \
    fastlm::name::fill(table[count].attention);              \
    fastlm::name::fill(table[count].cross_entropy);          \
    fastlm::name::fill(table[count].gru);                    \
    fastlm::name::fill(table[count].linear);                 \
    fastlm::name::fill(table[count].linear_cross_entropy);   \
    fastlm::name::fill(table[count].peak);                   \
  }                                                          \
  ++count;
    FASTLM_FOR_EACH_ISA(FASTLM_FILL)
    const char* wanted = std::getenv("FASTLM_ISA");  // fastlm/_C.py reports one that is not there
    for (int i = 0; i < count; ++i)
      if (table[i].runs_here()) current = &table[i];
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

Pool torch_pool() {
  return {[](int64_t n, int64_t grain, RangeFn f, void* ctx) {
#ifdef FASTLM_OWN_THREADS
            run_on_own_threads(int(torch::stable::get_num_threads()), n, grain, f, ctx);
#else
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, f, ctx));
#endif
          },
          int(torch::stable::get_num_threads())};
}

namespace {

// As the Linux kernel has found them; the C library's figures are wrong in some virtual machines. Elsewhere, and for a
// cache that isn't there, what most servers have at least.
Caches find_caches() {
  Caches found{int64_t(1) << 20, int64_t(16) << 20};
  for (int index = 0; index < 8; ++index) {
    const auto read = [&](const char* what, long& value) {
      char path[80];
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, what);
      std::FILE* const file = std::fopen(path, "r");
      const bool ok = file && std::fscanf(file, "%ld", &value) == 1 && value > 0;
      if (file) std::fclose(file);
      return ok;
    };
    long level, kibibytes;
    if (!read("level", level) || !read("size", kibibytes)) break;
    if (level == 2) found.second = int64_t(kibibytes) << 10;
    if (level == 3) found.third = int64_t(kibibytes) << 10;
  }
  return found;
}

}  // namespace

const Caches& caches() {
  static const Caches found = find_caches();
  return found;
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
    const size_t size = (bytes + 4095) / 4096 * 4096;
    b.data = std::aligned_alloc(64, size);
    b.size = b.data ? size : 0;
    if (!b.data) throw std::bad_alloc();
  }
  return b.data;
}

}  // namespace fastlm
