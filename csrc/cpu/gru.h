// One layer of a gated recurrent unit (Cho et al. 2014, with the reset gate after the product, as in
// torch), in one or both directions, over all time steps:
//   r = sigmoid(x W_ir + b_ir + h W_hr + b_hr)     q = h W_hn + b_hn
//   z = sigmoid(x W_iz + b_iz + h W_hz + b_hz)     n = tanh(x W_in + b_in + r q)
//   h' = n + k (h - n),  k = z, or 1 - u (1 - z) with zoneout (Krueger et al. 2017; u = 0 keeps h)
// With layer norm (Ba et al. 2016) x W and h W are each normalised over their 3H values and scaled by a
// gain before the bias is added.
//
// Fused: both weights are packed once. The input products of some steps are made at a time, by the threads that
// take these steps next, in cache; the recurrence makes the gates where its products end. Kept for the backward:
// r, z, n, q (and what the norms need).
// The backward walks back through time with dh in scratch, then forms each weight's gradient in one
// matrix product over all rows.
//
// Rows are (time step, sequence) pairs in time-major order; step t holds the sequences 0 ... that last
// so long, as in a PackedSequence, so sequences that have ended cost nothing.
// T steps, B sequences, I input features, H hidden units, N rows, D directions. S storage type, F
// compute type (double for double, else float). Gate order is torch's: r, z, n.
#pragma once
#include "kernels.h"

namespace fastlm {

struct GruWeights {  // of one direction; biases and gains may be null, the gains together
  const void* w_ih;  // S[3H][I]
  const void* w_hh;  // S[3H][H]
  const void* b_ih;  // S[3H]
  const void* b_hh;  // S[3H]
  const void* g_ih;  // S[3H], gain of the norm of x W
  const void* g_hh;  // S[3H], gain of the norm of h W
};

struct GruParams {
  Pool pool;
  int64_t T, B, I, H, N, D;
  const int64_t* offsets;  // [T + 1], step t holds rows offsets[t] ... offsets[t + 1]
  double zoneout;          // u = 1 - zoneout where there is no mask
  GruWeights weights[2];
  const void* x;       // S[N][I]
  const void* h0;      // S[D][B][H]
  const void* update;  // S[N][D H], u, or null
  void* out;           // S[N][D H]
  void* hn;            // S[D][B][H]
  void* gates;         // F[D][N][4H] r z n q, or null when no backward follows
  void* normed;        // F[D][N][6H] x W and h W normalised, before their gains, or null
  void* rstd;          // F[D][N][2], or null
  void* workspace;
};

struct GruGradients {
  const void* dout;     // S[N][D H] or null
  const void* dhn;      // S[D][B][H] or null
  void* dx;             // S[N][I], or null where not wanted
  void* dh0;            // S[D][B][H]
  bool weights_wanted;  // else the pointers below are null
  struct {
    void *dw_ih, *dw_hh, *db_ih, *db_hh, *dg_ih, *dg_hh;
  } d[2];
};

struct GruKernels {
  int64_t (*forward_workspace[kDTypes])(const GruParams&);  // bytes
  void (*forward[kDTypes])(const GruParams&);
  int64_t (*backward_workspace[kDTypes])(const GruParams&, const GruGradients&);
  void (*backward[kDTypes])(const GruParams&, const GruGradients&);
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "gru_forward.h"
#include "gru_backward.h"

namespace fastlm::FASTLM_ISA {

void fill(GruKernels& k) {
#define FASTLM_GRU(dtype, S)                       \
  k.forward_workspace[dtype] = gru::forward_workspace<S>;   \
  k.forward[dtype] = gru::forward<S>;              \
  k.backward_workspace[dtype] = gru::backward_workspace<S>; \
  k.backward[dtype] = gru::backward<S>;
  FASTLM_GRU(kF64, double)
  FASTLM_GRU(kF32, float)
  FASTLM_GRU(kBF16, bf16)
  FASTLM_GRU(kF16, f16)
#undef FASTLM_GRU
}

}  // namespace fastlm::FASTLM_ISA
#endif
