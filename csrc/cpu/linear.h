// A linear layer of a few tokens, y (M, N) = x (M, K) W^T (* scale) (+ bias): few_tokens.h. The gradient of a bias.
#pragma once
#include "few_tokens.h"

namespace fastlm {

struct SumRowsParams {
  Pool pool;
  int64_t rows, columns;
  const void* input;  // [rows][columns]
  void* result;       // [columns], of the compute type
};

struct LinearKernels {
  void (*plain[kDTypes])(const FewTokensParams&);
  void (*int8[kDTypes])(const FewTokensParams&);  // of weights of int8
  void (*sum_rows[kDTypes])(const SumRowsParams&);
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "rows.h"

namespace fastlm::FASTLM_ISA {

template <class S> void sum_rows(const SumRowsParams& p) {
  using F = compute_t<S>;
  column_sums<F>(p.pool, p.rows, p.columns, static_cast<const S*>(p.input), p.columns, static_cast<const F*>(nullptr), 0,
                 static_cast<F*>(p.result));
}

void fill(LinearKernels& k) {
#define FASTLM_LINEAR(dtype, S)             \
  k.plain[dtype] = few_tokens<S, S, S>;     \
  k.int8[dtype] = few_tokens<S, int8_t, S>; \
  k.sum_rows[dtype] = sum_rows<S>;
  FASTLM_LINEAR(kF64, double)
  FASTLM_LINEAR(kF32, float)
  FASTLM_LINEAR(kBF16, bf16)
  FASTLM_LINEAR(kF16, f16)
#undef FASTLM_LINEAR
}

}  // namespace fastlm::FASTLM_ISA
#endif
