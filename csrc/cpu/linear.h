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
namespace fastlm::FASTLM_ISA {

// Each column in the same order however the columns are divided: eight rows as a tree, the eights of a block one by
// one, and then the blocks.
template <class S> void sum_rows(const SumRowsParams& p) {
  using F = compute_t<S>;
  constexpr int64_t kRows = 8, kBlock = 128, kColumns = 1024;  // sums of columns stay in the first-level cache
  const S* const input = static_cast<const S*>(p.input);
  F* const result = static_cast<F*>(p.result);
  parallel(p.pool, ceil_div<int64_t>(p.columns, 64), 1, [&](int64_t first, int64_t last) {
    alignas(64) F block[kColumns];
    const int64_t end = least(last * 64, p.columns);
    for (int64_t begin = first * 64; begin < end; begin += kColumns) {
      const int64_t columns = least(end - begin, kColumns);
      __builtin_memset(result + begin, 0, size_t(columns) * sizeof(F));
      for (int64_t row = 0; row < p.rows; row += kBlock) {
        __builtin_memset(block, 0, sizeof block);
        const int64_t rows = least(p.rows - row, kBlock);
        for (int64_t i = 0; i < rows; i += kRows) {
          const S* const x = input + (row + i) * p.columns + begin;
          const auto add = [&](int64_t c, auto at) FASTLM_INLINED {
            store(block + c, load(block + c) + ((at(0) + at(1)) + (at(2) + at(3))) + ((at(4) + at(5)) + (at(6) + at(7))));
          };
          const int64_t left = rows - i;
          int64_t c = 0;
          if (left >= kRows)
            for (; c + kLanes<F> <= columns; c += kLanes<F>)
              add(c, [&](int64_t r) FASTLM_INLINED { return load<F>(x + r * p.columns + c); });
          for (; c < columns; c += kLanes<F>) {
            const int64_t lanes = least<int64_t>(columns - c, kLanes<F>);
            add(c, [&](int64_t r) FASTLM_INLINED {
              return r < left ? load<F>(x + r * p.columns + c, lanes) : Vec<F>{};
            });
          }
        }
        for (int64_t c = 0; c < columns; ++c) result[begin + c] += block[c];
      }
    }
  });
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
