// Forward of a GRU layer through time; gru.cuh says how the work is divided.
//   r = sigmoid(x_r + h W_hr + b_r)    q = h W_hn + b_q
//   z = sigmoid(x_z + h W_hz + b_z)    n = tanh(x_n + b_n + r q)      h' = n + z (h - n)
// x: the input's products, made before for all steps. A tile has 8 units, and the weights of their three
// gates; whoever owns a cell keeps its state in float32, and hands it on in the storage type.
#pragma once
#include "gru_norm.cuh"

namespace fastlm::cuda {

template <class S> struct GruForwardParams {
  GruWalk<S> walk;
  float* x;            // [D][N][x_row] x W in; with `save` the gates r z n q out
  int64_t x_row;
  bool save, zoneout;
  float keep_change;   // u where there is no mask
  const S* update;     // [N][D H], u, or null
  const S* h0;         // [D][B][H]
  const float* bias;   // [D][4][H] of r, z, n, q, or null
  const S* gain[2];    // of the norm of h W, [3H], or null
  float* state;        // [D][B][H]
  float* raw;          // [D][B][3H] h W, with layer norm
  S* out;              // [N][D H]
  S* hn;               // [D][B][H]
  float* normed;       // [D][N][6H] or null
  float* rstd;         // [D][N][2] or null
};

template <class S, bool kResident> struct GruForward {
  using Block = GruBlock<S, 3, 8, kResident>;

  const GruForwardParams<S>& p;
  Block block;
  const int64_t H = p.walk.H, B = p.walk.B;
  const int d = block.d;

  FASTLM_DEVICE explicit GruForward(const GruForwardParams<S>& params) : p(params), block(params.walk) {}

  struct Step {
    int64_t t, first, now, later;  // first row; sequences at t and at t + 1
    int64_t buffer;                // of the exchange, that holds the states before
  };
  FASTLM_DEVICE Step step_at(int64_t s) const {
    const int64_t t = d ? p.walk.T - 1 - s : s;
    return {t, block.first_row(t), block.active(t), block.active(t + 1), s % 2};
  }

  // What enters a cell beside the recurrent products.
  struct Inputs { float r, z, n, q, h, u; };

  FASTLM_DEVICE Inputs inputs(const GruCell& cell, const Step& at) const {
    if (!cell.used) return {};
    const int64_t row = at.first + cell.b, state = (d * B + cell.b) * H + cell.unit;
    const float* const x = p.x + (d * p.walk.N + row) * p.x_row + cell.unit;
    const bool first = d ? cell.b >= at.later : at.t == 0;
    Inputs in{x[0], x[H], x[2 * H], 0, first ? widen(p.h0[state]) : p.state[state], p.keep_change};
    if (p.bias) {
      const float* const b = p.bias + d * 4 * H + cell.unit;
      in.r += b[0];
      in.z += b[H];
      in.n += b[2 * H];
      in.q = b[3 * H];
    }
    if (p.update) in.u = widen(p.update[row * p.walk.D * H + d * H + cell.unit]);
    return in;
  }

  FASTLM_DEVICE void make_gates(const GruCell& cell, const Step& at, const Inputs& in, const float (&y)[3]) const {
    if (!cell.used) return;
    const float r = sigmoid_of(in.r + y[0]), z = sigmoid_of(in.z + y[1]), q = in.q + y[2];
    const float n = tanh_of(in.n + r * q);
    // With zoneout so that u = 0 keeps the old state to the bit.
    const float h = p.zoneout ? in.h + in.u * (1 - z) * (n - in.h) : n + z * (in.h - n);
    const int64_t row = at.first + cell.b, state = (d * B + cell.b) * H + cell.unit;
    p.state[state] = h;
    block.exchange_row(1 - at.buffer, cell.b)[cell.unit] = operand(narrow<S>(h));
    p.out[row * p.walk.D * H + d * H + cell.unit] = narrow<S>(h);
    if (d ? at.t == 0 : cell.b >= at.later) p.hn[state] = narrow<S>(h);
    if (p.save) {
      float* const x = p.x + (d * p.walk.N + row) * p.x_row + cell.unit;
      x[0] = r;
      x[H] = z;
      x[2 * H] = n;
      x[3 * H] = q;
    }
  }

  // With layer norm: a cell's products, and its tile's share of the row's sums.
  FASTLM_DEVICE void keep_products(const GruCell& cell, const float (&y)[3]) const {
    const int64_t tile = cell.unit / 8;
    const GruMoments m = gru_moments(y, cell.used, gru_values(H, tile));
    if (!cell.used) return;
    float* const raw = p.raw + (d * B + cell.b) * 3 * H + cell.unit;
    raw[0] = y[0];
    raw[H] = y[1];
    raw[2 * H] = y[2];
    if (cell.unit % 8) return;
    float* const to = block.partial_row(cell.b) + 2 * tile;
    to[0] = m.mean;
    to[1] = m.squares;
  }

  // The recurrent products of a step, and without layer norm its gates.
  FASTLM_DEVICE void products(int64_t s, bool meets) {
    const Step at = step_at(s);
    const bool norm = p.gain[d];
    for (int round = 0; round < block.rounds; ++round) {
      const GruTile tile = block.tile_at(round);
      Inputs in[Block::kCells];
      if (!norm)  // under way while the blocks meet
        block.each_cell(tile, at.now, [&](int i, const GruCell& cell) { in[i] = inputs(cell, at); });
      if (round == 0 && meets) block.meet();
      block.multiply(tile, at.buffer, at.now);
      __syncthreads();
      block.each_cell(tile, at.now, [&](int i, const GruCell& cell) {
        const float y[3] = {block.sum(tile, 0, cell.place), block.sum(tile, 1, cell.place),
                            block.sum(tile, 2, cell.place)};
        if (norm) keep_products(cell, y);
        else make_gates(cell, at, in[i], y);
      });
      if (round + 1 < block.rounds) __syncthreads();
    }
  }

  // With layer norm, the gates of a step.
  FASTLM_DEVICE void gates(int64_t s) const {
    const Step at = step_at(s);
    for (int round = 0; round < block.rounds; ++round) {
      const GruTile tile = block.tile_at(round);
      block.each_cell(tile, at.now, [&](int, const GruCell& cell) {
        const Inputs in = inputs(cell, at);
        float mean, rstd;
        gru_statistics(block.partial_row(cell.b), cell.row_used, H, mean, rstd);
        if (!cell.used) return;
        const int64_t row = d * p.walk.N + at.first + cell.b;
        const float* const raw = p.raw + (d * B + cell.b) * 3 * H + cell.unit;
        float y[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const float v = (raw[i * H] - mean) * rstd;
          if (p.normed) p.normed[row * 6 * H + (3 + i) * H + cell.unit] = v;
          y[i] = v * widen(p.gain[d][i * H + cell.unit]);
        }
        if (p.rstd && cell.unit == 0) p.rstd[row * 2 + 1] = rstd;
        make_gates(cell, at, in, y);
      });
    }
  }

  FASTLM_DEVICE void run() {
    if constexpr (kResident) {
      const int64_t begin = d ? p.walk.T - block.steps : 0;
      for (int64_t s = begin; s < begin + block.steps; ++s) {
        products(s, s > begin);
        if (!p.gain[d]) continue;
        block.meet();
        gates(s);
      }
    } else {
      if (block.first_sequence() >= step_at(p.walk.step).now) return;
      if (p.walk.stage == 0) products(p.walk.step, false);
      else gates(p.walk.step);
    }
  }
};

// All steps of a group, with its weights at hand.
template <class S>
__global__ void __launch_bounds__(kGruThreads, 1) gru_forward(const __grid_constant__ GruForwardParams<S> p) {
  if constexpr (kServed<S>) GruForward<S, true>(p).run();
}

// One step.
template <class S>
__global__ void __launch_bounds__(kGruThreads, 1) gru_forward_step(const __grid_constant__ GruForwardParams<S> p) {
  if constexpr (kServed<S>) GruForward<S, false>(p).run();
}

}  // namespace fastlm::cuda
