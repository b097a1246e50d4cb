// Facts of the build and the choice of instruction set, as C functions: fastlm/_C.py reads them
// through ctypes. Without Python's own headers one build serves every Python version, and building
// needs no python3-dev.
#include <atomic>
#include <cstring>

#include "cpu/dispatch.h"

#define FASTLM_API extern "C" __attribute__((visibility("default")))

FASTLM_API const char* fastlm_isa() { return fastlm::kernels().isa; }

// The i-th instruction set that was built, from slow to fast; null behind the last.
FASTLM_API const char* fastlm_isa_name(int i) {
  int count;
  const fastlm::Kernels* table = fastlm::all_kernels(&count);
  return i >= 0 && i < count ? table[i].isa : nullptr;
}

FASTLM_API bool fastlm_isa_runs_here(int i) {
  int count;
  const fastlm::Kernels* table = fastlm::all_kernels(&count);
  return i >= 0 && i < count && table[i].runs_here();
}

FASTLM_API bool fastlm_set_isa(const char* name) {
  int count;
  const fastlm::Kernels* table = fastlm::all_kernels(&count);
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(name, table[i].isa) && table[i].runs_here()) {
      fastlm::use_kernels(table[i]);
      return true;
    }
  return false;
}

// Loads every thread of torch's pool with `rounds` rounds of multiply-adds (of pairs of bf16: `bf16`)
// and returns the operations done; 0 where the instruction set has no such instruction.
FASTLM_API double fastlm_multiply_adds(int64_t rounds, bool bf16) {
  struct Job {
    double (*run)(int64_t);
    int64_t rounds;
    std::atomic<double> operations{0};
  } job{bf16 ? fastlm::kernels().peak.bf16_dot : fastlm::kernels().peak.fma, rounds};
  if (!job.run) return 0;
  const fastlm::Pool pool = fastlm::torch_pool();
  pool.parallel_for(
      pool.threads, 1,
      [](int64_t begin, int64_t end, void* ctx) {
        Job& j = *static_cast<Job*>(ctx);
        for (int64_t i = begin; i < end; ++i) j.operations += j.run(j.rounds);
      },
      &job);
  return job.operations;
}

FASTLM_API const char* fastlm_compiler() { return FASTLM_COMPILER; }
FASTLM_API const char* fastlm_torch_version() { return FASTLM_TORCH_VERSION; }
