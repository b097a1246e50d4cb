#pragma once
#include "kernels.h"

namespace fastlm {
struct CrossEntropyKernels {};
}  // namespace fastlm

#ifdef FASTLM_ISA
#include "gemm.h"
namespace fastlm::FASTLM_ISA {
void fill(CrossEntropyKernels&) {}
}  // namespace fastlm::FASTLM_ISA
#endif
