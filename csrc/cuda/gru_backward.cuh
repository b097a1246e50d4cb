// Backward of a GRU layer through time; gru.cuh says how the work is divided. With dh the gradient of h',
// k = z (with zoneout 1 - u (1 - z)) and c = 1 - k:
//   dn = dh c (1 - n^2)    dq = dn r    dr = dn q r (1 - r)    dz = dh u (h - n) z (1 - z)
//   dh_prev = dh k + (dr, dz, dq) W_hh
// A step adds the products of the step before to dh, makes the gates' gradients of its own, and hands
// (dr, dz, dq) on in the storage type; one step more than there are ends with the gradient of h0. A tile has
// 16 units, for whose columns of W_hh the K are all 3H rows. The gradients of weights and input are matrix
// products over the rows that are left behind.
#pragma once
#include "gru_norm.cuh"

namespace fastlm::cuda {

template <class S> struct GruBackwardParams {
  GruWalk<S> walk;
  bool zoneout;
  float keep_change;    // u where there is no mask
  const S* update;      // [N][D H], u, or null
  const S* dout;        // [N][D H] or null
  const S* dhn;         // [D][B][H] or null
  const S* h0;          // [D][B][H]
  const S* out;         // [N][D H]
  const float* gates;   // [D][N][4H] r z n q
  float* carry;         // [D][B][H], dh k
  S* dh0;               // [D][B][H]
  S* dx;                // [N][D][3H] dr dz dn, the gradient of x W + b
  S* dq;                // [D][N][H], or [D][N][3H], all of the gradient of h W, with layer norm
  S* previous;          // [D][N][H] the states before, or null
  const S* gain[2];     // of the norm of h W, [3H], or null
  float* outer;         // [D][N][3H] dr dz dq before the norm's own backward, with layer norm
  const float* normed;  // [D][N][6H]
  const float* rstd;    // [D][N][2]
};

template <class S, bool kResident> struct GruBackward {
  using Block = GruBlock<S, 2, 16, kResident>;

  const GruBackwardParams<S>& p;
  Block block;
  const int64_t H = p.walk.H, B = p.walk.B, N = p.walk.N;
  const int d = block.d;

  FASTLM_DEVICE explicit GruBackward(const GruBackwardParams<S>& params) : p(params), block(params.walk) {}

  // was: sequences of the step made before, which is t + 1, backwards in time t - 1.
  struct Step { int64_t t, first, now, was, later, buffer; };
  FASTLM_DEVICE Step step_at(int64_t s) const {
    const int64_t t = d ? s : p.walk.T - 1 - s, later = block.active(t + 1), now = block.active(t);
    return {t, now ? block.first_row(t) : 0, now, d ? block.active(t - 1) : later, later, s % 2};
  }

  // What a cell needs beside the products with the step before, found while the blocks meet: the rest of
  // the state's gradient, and what makes of the whole of it dn, dz and the gradient of the old state; of dn,
  // dr and dq.
  struct Factors { float grad, n, z, keep, r, q; };

  FASTLM_DEVICE Factors factors(const GruCell& cell, const Step& at) const {
    if (!cell.used) return {};
    const int64_t state = (d * B + cell.b) * H + cell.unit;
    float grad = cell.b < at.was ? p.carry[state] : p.dhn ? widen(p.dhn[state]) : 0;
    if (cell.b >= at.now) return {grad, 0, 0, 0, 0, 0};
    const int64_t row = at.first + cell.b, width = p.walk.D * H, place = row * width + d * H + cell.unit;
    if (p.dout) grad += widen(p.dout[place]);
    S before = p.h0[state];
    if (d ? cell.b < at.later : at.t > 0) {
      const int64_t first = d ? block.first_row(at.t + 1) : block.first_row(at.t - 1);
      before = p.out[(first + cell.b) * width + d * H + cell.unit];
    }
    if (p.previous) p.previous[(d * N + row) * H + cell.unit] = before;
    const float* const g = p.gates + (d * N + row) * 4 * H + cell.unit;
    const float r = g[0], z = g[H], n = g[2 * H], q = g[3 * H];
    const float u = !p.zoneout ? 1 : p.update ? widen(p.update[place]) : p.keep_change;
    const float keep = p.zoneout ? 1 - u * (1 - z) : z;
    return {grad, (1 - keep) * (1 - n * n), u * (widen(before) - n) * z * (1 - z), keep, q * r * (1 - r), r};
  }

  // What is handed on, and kept for the gradient of W_hh: (dr, dz, dq).
  FASTLM_DEVICE void give(const GruCell& cell, const Step& at, const float (&y)[3]) const {
    S* const to = block.exchange_row(at.buffer, cell.b) + cell.unit;
    const int64_t row = d * N + at.first + cell.b;
#pragma unroll
    for (int i = 0; i < 3; ++i) to[i * H] = operand(narrow<S>(y[i]));
    if (p.gain[d]) {
      S* const dq = p.dq + row * 3 * H + cell.unit;
#pragma unroll
      for (int i = 0; i < 3; ++i) dq[i * H] = narrow<S>(y[i]);
    } else {
      p.dq[row * H + cell.unit] = narrow<S>(y[2]);
    }
  }

  // With layer norm: (dr, dz, dq), kept, and their tile's share of the row's sums.
  FASTLM_DEVICE void keep_outer(const GruCell& cell, const Step& at, bool used, const float (&y)[3]) const {
    const int64_t row = d * N + at.first + cell.b;
    float sum = 0, dot = 0;
    if (used) {
      const float* const v = p.normed + row * 6 * H + 3 * H + cell.unit;
      float* const outer = p.outer + row * 3 * H + cell.unit;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float dv = y[i] * widen(p.gain[d][i * H + cell.unit]);
        outer[i * H] = y[i];
        sum += dv;
        dot += dv * v[i * H];
      }
    }
    sum = warp_sum<8>(sum);
    dot = warp_sum<8>(dot);
    if (!used || cell.unit % 8) return;
    float* const to = block.partial_row(cell.b) + cell.unit / 8 * 2;
    to[0] = sum;
    to[1] = dot;
  }

  FASTLM_DEVICE void make_gradients(const GruCell& cell, const Step& at, const Factors& f, float product) const {
    const int64_t state = (d * B + cell.b) * H + cell.unit;
    const float grad = f.grad + (cell.b < at.was ? product : 0);
    const bool goes_on = cell.used && cell.b < at.now;
    if (cell.used && !goes_on) p.dh0[state] = narrow<S>(grad);
    const float dn = grad * f.n, dz = grad * f.z, dr = dn * f.r;
    if (goes_on) {
      p.carry[state] = grad * f.keep;
      S* const dx = p.dx + ((at.first + cell.b) * p.walk.D + d) * 3 * H + cell.unit;
      dx[0] = narrow<S>(dr);
      dx[H] = narrow<S>(dz);
      dx[2 * H] = narrow<S>(dn);
    }
    const float y[3] = {dr, dz, dn * f.q};
    if (p.gain[d]) keep_outer(cell, at, goes_on, y);
    else if (goes_on) give(cell, at, y);
  }

  // The products with the step before, and the gates' gradients of step s.
  FASTLM_DEVICE void gradients(int64_t s, bool meets) {
    const Step at = step_at(s);
    const int64_t either = max(at.now, at.was);
    for (int round = 0; round < block.rounds; ++round) {
      const GruTile tile = block.tile_at(round);
      Factors f[Block::kCells];
      block.each_cell(tile, either, [&](int i, const GruCell& cell) { f[i] = factors(cell, at); });
      if (round == 0 && meets) block.meet();
      block.multiply(tile, 1 - at.buffer, at.was);
      __syncthreads();
      block.each_cell(tile, either, [&](int i, const GruCell& cell) {
        make_gradients(cell, at, f[i], block.sum(tile, cell.group, cell.place));
      });
      if (round + 1 < block.rounds) __syncthreads();
    }
  }

  // With layer norm: (dr, dz, dq) of step s back through it.
  FASTLM_DEVICE void norm(int64_t s) const {
    const Step at = step_at(s);
    for (int round = 0; round < block.rounds; ++round) {
      const GruTile tile = block.tile_at(round);
      block.each_cell(tile, at.now, [&](int, const GruCell& cell) {
        float mean, slope;
        gru_slopes(block.partial_row(cell.b), cell.row_used, H, mean, slope);
        if (!cell.used) return;
        const int64_t row = d * N + at.first + cell.b;
        const float rstd = p.rstd[row * 2 + 1];
        float y[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const int64_t at_gate = i * H + cell.unit;
          const float dv = p.outer[row * 3 * H + at_gate] * widen(p.gain[d][at_gate]);
          y[i] = rstd * (dv - mean - p.normed[row * 6 * H + 3 * H + at_gate] * slope);
        }
        give(cell, at, y);
      });
    }
  }

  FASTLM_DEVICE void run() {
    if constexpr (kResident) {
      const int64_t begin = d ? 0 : p.walk.T - block.steps, end = begin + block.steps;
      for (int64_t s = begin; s <= end; ++s) {
        gradients(s, s > begin);
        if (!p.gain[d] || s == end) continue;
        block.meet();
        norm(s);
      }
    } else {
      const Step at = step_at(p.walk.step);
      if (block.first_sequence() >= max(at.now, at.was)) return;
      if (p.walk.stage == 0) gradients(p.walk.step, false);
      else norm(p.walk.step);
    }
  }
};

// All steps of a group, with its weights at hand.
template <class S>
__global__ void __launch_bounds__(kGruThreads, 1) gru_backward(const __grid_constant__ GruBackwardParams<S> p) {
  if constexpr (kServed<S>) GruBackward<S, true>(p).run();
}

// One step.
template <class S>
__global__ void __launch_bounds__(kGruThreads, 1) gru_backward_step(const __grid_constant__ GruBackwardParams<S> p) {
  if constexpr (kServed<S>) GruBackward<S, false>(p).run();
}

}  // namespace fastlm::cuda
