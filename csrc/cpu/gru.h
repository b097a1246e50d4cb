#pragma once
#include "kernels.h"

namespace fastlm {
struct GruKernels {};
}  // namespace fastlm

#ifdef FASTLM_ISA
#include "gemm.h"
namespace fastlm::FASTLM_ISA {
void fill(GruKernels&) {}
}  // namespace fastlm::FASTLM_ISA
#endif
