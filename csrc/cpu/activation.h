// GELU, x Phi(x) for the normal distribution's Phi or its approximation by tanh, and its gradient.
//
//   Phi(-a) = exp(-a^2 / 2) t Q(t),  t = 1 / (1 + p a),  for a >= 0       the form of Hastings (1955)
//   Phi(x) ~ (1 + tanh u) / 2 = sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
//
// Source: Hendrycks and Gimpel 2016, arXiv:1606.08415. Neither form cancels where x is far below 0.
#pragma once
#include "kernels.h"

namespace fastlm {

struct GeluParams {
  Pool pool;
  int64_t n;
  const void* input;
  const void* dout;  // null for the forward
  void* result;      // the output, or the gradient
};

struct ActivationKernels {
  // [tanh]; none of float64
  void (*gelu[2][kDTypes])(const GeluParams&);
  void (*gelu_backward[2][kDTypes])(const GeluParams&);
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "rows.h"

namespace fastlm::FASTLM_ISA {

// y = x s, dy / dx = s + x ds.
struct GeluParts { Vec<float> s, ds; };

// Rough: within 1e-5, for what is rounded to 16 bits; otherwise Q is 1.3e-8 from the quotient that it stands for.
template <bool kTanh, bool kRough> FASTLM_INLINE GeluParts gelu_parts(Vec<float> x) {
  using V = Vec<float>;
  const V one = splat(1.f);
  if constexpr (kTanh) {
    const V near = max(splat(-16.f), min(splat(16.f), x));  // beyond, s is 0 or 1 and constant
    const V square = near * near;
    const V twice = near * fma(square, splat(0.0713548163f), splat(1.59576912f));
    const V e = exp_negative<kRough>(minus_abs(twice)), lesser = quotient(e, one + e);
    const V slope = fma(square, splat(0.214064449f), splat(1.59576912f));
    return {(x < V{}) ? lesser : one - lesser, lesser * (one - lesser) * slope};
  } else {
    const V a = min(splat(16.f), abs(x)), density = exp_negative<kRough>(a * a * splat(-0.5f));
    V t, q;
    if constexpr (kRough) {
      t = quotient(one, fma(a, splat(0.31f), one));
      q = fma(splat(-0.0745036926f), t, splat(0.182201038f));
      q = fma(q, t, splat(0.0137183040f));
      q = fma(q, t, splat(0.134533700f));
      q = fma(q, t, splat(0.120160967f));
      q = fma(q, t, splat(0.123887000f));
    } else {
      t = quotient(one, fma(a, splat(0.21f), one));
      q = fma(splat(-0.07232136f), t, splat(0.28685986f));
      q = fma(q, t, splat(-0.33713381f));
      q = fma(q, t, splat(0.35747244f));
      q = fma(q, t, splat(-0.09969406f));
      q = fma(q, t, splat(0.12744209f));
      q = fma(q, t, splat(0.06849646f));
      q = fma(q, t, splat(0.08517349f));
      q = fma(q, t, splat(0.08370489f));
    }
    const V lesser = density * t * q;
    return {(x < V{}) ? lesser : one - lesser, density * splat(0.398942280f)};
  }
}

template <class S, bool kTanh, bool kBackward> void gelu(const GeluParams& p) {
  constexpr bool kRough = sizeof(S) == 2;
  const S* const input = static_cast<const S*>(p.input);
  const S* const dout = static_cast<const S*>(p.dout);
  S* const result = static_cast<S*>(p.result);
  parallel(p.pool, p.n, 1 << 12, [&](int64_t begin, int64_t end) {
    each_vector<float>(begin, end, [&](int64_t i, int64_t w) FASTLM_INLINED {
      const Vec<float> x = get<float>(input + i, w);
      const GeluParts g = gelu_parts<kTanh, kRough>(x);
      put<float>(result + i, kBackward ? get<float>(dout + i, w) * fma(x, g.ds, g.s) : x * g.s, w);
    });
  });
}

void fill(ActivationKernels& k) {
#define FASTLM_GELU(dtype, S)                       \
  k.gelu[0][dtype] = gelu<S, false, false>;         \
  k.gelu[1][dtype] = gelu<S, true, false>;          \
  k.gelu_backward[0][dtype] = gelu<S, false, true>; \
  k.gelu_backward[1][dtype] = gelu<S, true, true>;
  FASTLM_GELU(kF32, float)
  FASTLM_GELU(kBF16, bf16)
  FASTLM_GELU(kF16, f16)
#undef FASTLM_GELU
}

}  // namespace fastlm::FASTLM_ISA
#endif
