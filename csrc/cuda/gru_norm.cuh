// Layer norm of a GRU's products (Ba et al. 2016): v = (y - mean) rstd over the 3H values of a row, scaled
// by a gain. The rows of x W are normalised by kernels of their own; those of h W within the recurrence,
// where each tile of 8 units gives its share of the sums and a row's eight lanes join them.
#pragma once
#include "gru.cuh"

namespace fastlm::cuda {

inline constexpr float kNormEps = 1e-5f;

// ---- within the recurrence -----------------------------------------------------------------

// A tile's mean and sum of squared differences, of the three products of a row's eight lanes.
struct GruMoments { float mean, squares; };

FASTLM_DEVICE GruMoments gru_moments(const float (&y)[3], bool used, int values) {
  const float mean = warp_sum<8>(used ? y[0] + y[1] + y[2] : 0) / float(values);
  const auto square = [&](float x) { return (x - mean) * (x - mean); };
  return {mean, warp_sum<8>(used ? square(y[0]) + square(y[1]) + square(y[2]) : 0)};
}

FASTLM_DEVICE int gru_values(int64_t H, int64_t tile) { return 3 * int(min(H - 8 * tile, int64_t(8))); }

// Mean and reciprocal deviation of a row from its tiles' moments, [H / 8, rounded up][2].
FASTLM_DEVICE void gru_statistics(const float* moments, bool used, int64_t H, float& mean, float& rstd) {
  const int64_t tiles = used ? (H + 7) / 8 : 0;
  const int first = lane_index() % 8;
  float sum = 0, squares = 0;
  for (int64_t i = first; i < tiles; i += 8) sum += moments[2 * i] * float(gru_values(H, i));
  mean = warp_sum<8>(sum) / float(3 * H);
  for (int64_t i = first; i < tiles; i += 8) {
    const float off = moments[2 * i] - mean;
    squares += moments[2 * i + 1] + off * off * float(gru_values(H, i));
  }
  rstd = 1 / sqrtf(warp_sum<8>(squares) / float(3 * H) + kNormEps);
}

// Backward: the means over a row of dv and of dv v, from its tiles' sums.
FASTLM_DEVICE void gru_slopes(const float* sums, bool used, int64_t H, float& mean, float& slope) {
  const int64_t tiles = used ? (H + 7) / 8 : 0;
  float a = 0, b = 0;
  for (int64_t i = lane_index() % 8; i < tiles; i += 8) {
    a += sums[2 * i];
    b += sums[2 * i + 1];
  }
  mean = warp_sum<8>(a) / float(3 * H);
  slope = warp_sum<8>(b) / float(3 * H);
}

// ---- rows of x W ---------------------------------------------------------------------------

template <class S> struct GruNormParams {
  int64_t N, width;
  float* y;        // [N][y_row] x W in; forward: gain v out
  int64_t y_row;
  S* dy;           // [N][dy_row] backward: the gradient of gain v in, of x W out
  int64_t dy_row;
  const S* gain;   // [width]
  float* normed;   // [N][2 width], v, or null
  float* rstd;     // [N][2] or null
};

template <class S> __global__ void __launch_bounds__(256) gru_norm(const __grid_constant__ GruNormParams<S> p) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());  // [2][8]
  const auto add = [](float a, float b) { return a + b; };
  const int64_t row = blockIdx.x;
  float* const y = p.y + row * p.y_row;
  float sum = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < p.width; i += 256) sum += y[i];
  const float mean = block_reduce<8>(sum, scratch, add) / float(p.width);
  for (int64_t i = threadIdx.x; i < p.width; i += 256) squares += (y[i] - mean) * (y[i] - mean);
  const float rstd = 1 / sqrtf(block_reduce<8>(squares, scratch + 8, add) / float(p.width) + kNormEps);
  if (p.rstd && threadIdx.x == 0) p.rstd[row * 2] = rstd;
  for (int64_t i = threadIdx.x; i < p.width; i += 256) {
    const float v = (y[i] - mean) * rstd;
    if (p.normed) p.normed[row * 2 * p.width + i] = v;
    y[i] = v * widen(p.gain[i]);
  }
}

template <class S>
__global__ void __launch_bounds__(256) gru_norm_backward(const __grid_constant__ GruNormParams<S> p) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());  // [2][8]
  const auto add = [](float a, float b) { return a + b; };
  const int64_t row = blockIdx.x;
  S* const dy = p.dy + row * p.dy_row;
  const float* const v = p.normed + row * 2 * p.width;
  float sum = 0, dot = 0;
  for (int64_t i = threadIdx.x; i < p.width; i += 256) {
    const float dv = widen(dy[i]) * widen(p.gain[i]);
    sum += dv;
    dot += dv * v[i];
  }
  const float mean = block_reduce<8>(sum, scratch, add) / float(p.width);
  const float slope = block_reduce<8>(dot, scratch + 8, add) / float(p.width), rstd = p.rstd[row * 2];
  for (int64_t i = threadIdx.x; i < p.width; i += 256) {
    const float dv = widen(dy[i]) * widen(p.gain[i]);
    dy[i] = narrow<S>(rstd * (dv - mean - v[i] * slope));
  }
}

}  // namespace fastlm::cuda
