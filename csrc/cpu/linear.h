// A linear layer of a few tokens, y (M, N) = x (M, K) W^T (* scale) (+ bias): few_tokens.h.
#pragma once
#include "few_tokens.h"

namespace fastlm {

struct LinearKernels {
  void (*plain[kDTypes])(const FewTokensParams&);
  void (*int8[kDTypes])(const FewTokensParams&);  // of weights of int8
};

}  // namespace fastlm

#ifdef FASTLM_ISA
namespace fastlm::FASTLM_ISA {

void fill(LinearKernels& k) {
#define FASTLM_LINEAR(dtype, S)         \
  k.plain[dtype] = few_tokens<S, S, S>; \
  k.int8[dtype] = few_tokens<S, int8_t, S>;
  FASTLM_LINEAR(kF64, double)
  FASTLM_LINEAR(kF32, float)
  FASTLM_LINEAR(kBF16, bf16)
  FASTLM_LINEAR(kF16, f16)
#undef FASTLM_LINEAR
}

}  // namespace fastlm::FASTLM_ISA
#endif
