// Facts of the build and the choice of instruction set, as C functions: fastlm/_C.py reads them
// through ctypes. Without Python's own headers one build serves every Python version, and building
// needs no python3-dev.
#include <cstring>

#include "cpu/dispatch.h"

#define FASTLM_API extern "C" __attribute__((visibility("default")))

FASTLM_API const char* fastlm_isa() { return fastlm::kernels().isa; }

// The i-th instruction set that was built, from plain to wide; null behind the last.
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

FASTLM_API const char* fastlm_compiler() { return FASTLM_COMPILER; }
FASTLM_API const char* fastlm_torch_version() { return FASTLM_TORCH_VERSION; }
