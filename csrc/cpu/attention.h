#pragma once
#include "kernels.h"

namespace fastlm {
struct AttentionKernels {};
}  // namespace fastlm

#ifdef FASTLM_ISA
#include "gemm.h"
namespace fastlm::FASTLM_ISA {
void fill(AttentionKernels&) {}
}  // namespace fastlm::FASTLM_ISA
#endif
