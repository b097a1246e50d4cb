// The multiply-add units at full load: independent chains in registers, no memory. The benchmarks'
// floor is measured with it.
#pragma once
#include "kernels.h"

namespace fastlm {

// Each runs on the calling thread and returns the operations done, a multiply and an add being two.
struct PeakKernels {
  double (*fma)(int64_t rounds);
  double (*bf16_dot)(int64_t rounds);  // null where the ISA has no such instruction
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "gemm.h"

namespace fastlm::FASTLM_ISA {

// x -> step(x, a) in as many chains as a micro-kernel has accumulators: enough for the latency of any
// CPU so far. `products` are those of one step. The seed is unknown to the compiler.
template <class Step> FASTLM_INLINE double run_chains(int64_t rounds, int products, Step step) {
  constexpr int kChains = kMR * kNV, kSteps = 64;
  volatile float seed = 0.5f;
  const Vec<float> a = splat<float>(seed);
  Vec<float> chain[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) chain[i] = splat(float(i)) * a;
  for (int64_t n = rounds * kSteps; n > 0; --n) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = step(chain[i], a);
  }
  Vec<float> sum{};
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  seed = sum[0];
  return 2. * double(rounds) * kSteps * kChains * products;
}

// The chain is a factor, not the addend: a product of constants would be taken out of the loop.
inline double run_fma(int64_t rounds) {
  return run_chains(rounds, kLanes<float>, [](Vec<float> x, Vec<float> a) { return fma(x, a, a); });
}

inline double run_bf16_dot(int64_t rounds) {
  return run_chains(rounds, 2 * kLanes<float>, [](Vec<float> x, Vec<float> a) {
    return dot2(x, bits_of<Words>(a), bits_of<Words>(a));
  });
}

void fill(PeakKernels& k) {
  k.fma = run_fma;
  k.bf16_dot = kHasBf16Dot ? run_bf16_dot : nullptr;
}

}  // namespace fastlm::FASTLM_ISA
#endif
