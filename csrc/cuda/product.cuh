// Tiles in shared memory and the two matrix products of a warp that attention, GRU and losses are made
// of, for 16-bit types on tensor cores and for float32 by multiply-adds, with the same fragments.
//
// An accumulator is c[N][4], N tiles of 16 x 8 side by side, as mma leaves them: with g = lane / 4 and
// t = lane % 4, c[n][0] is at (g, 8 n + 2 t), c[n][1] in the next column, c[n][2] and c[n][3] 8 rows below.
#pragma once
#include "device.cuh"

namespace fastlm::cuda {

// Rows of COLUMNS elements in 16-byte chunks. A chunk's place in its row is turned by the row's number,
// so that the same chunk of 8 neighbouring rows, and 8 neighbouring chunks of a row, lie in all banks.
template <class T, int COLUMNS> struct Tile {
  static constexpr int kChunks = COLUMNS / kPerVector<T>;
  static_assert(COLUMNS % kPerVector<T> == 0 && (kChunks & (kChunks - 1)) == 0 && kChunks >= 2);
  static constexpr size_t bytes(int rows) { return size_t(rows) * COLUMNS * sizeof(T); }

  T* data;

  FASTLM_DEVICE T* chunk(int row, int c) const {
    constexpr int kTurns = kChunks < 8 ? kChunks : 8;
    return data + (row * kChunks + (c ^ (row / (8 / kTurns) % kTurns))) * kPerVector<T>;
  }
  FASTLM_DEVICE T* at(int row, int column) const {
    return chunk(row, column / kPerVector<T>) + column % kPerVector<T>;
  }
};

// Starts copies of ROWS rows from global memory, row_stride elements apart, by all THREADS of the block;
// zeros from row `rows` and from column `columns` (a multiple of a chunk) on. Rows start at 16 bytes.
template <int ROWS, int THREADS, class T, int COLUMNS>
FASTLM_DEVICE void copy_tile(Tile<T, COLUMNS> tile, const T* from, int64_t row_stride, int rows, int columns) {
  constexpr int kChunks = Tile<T, COLUMNS>::kChunks;
#pragma unroll
  for (int i = int(threadIdx.x); i < ROWS * kChunks; i += THREADS) {
    const int row = i / kChunks, c = i % kChunks;
    const bool valid = row < rows && c * kPerVector<T> < columns;
    cp_async(tile.chunk(row, c), valid ? from + row * row_stride + c * kPerVector<T> : from, valid);
  }
}

// c += A B^T: 16 rows of a from `row` on, 8 N rows of b from `column` on, both over K columns.
template <int K, class T, int A, int B, int N>
FASTLM_DEVICE void multiply_rows(float (&c)[N][4], Tile<T, A> a, int row, Tile<T, B> b, int column) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    static_assert(K % 16 == 0 && N % 2 == 0);
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
      uint32_t x[4];
      ldmatrix(x, a.chunk(row + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t y[4];
        ldmatrix(y, b.chunk(column + 8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        mma(c[n], x, y[0], y[1], T{});
        mma(c[n + 1], x, y[2], y[3], T{});
      }
    }
  } else {
    using Four = Pack<T, 4>;
    const int g = lane / 4, t = lane % 4;
#pragma unroll 4
    for (int k = 0; k < K / 4; ++k) {
      const Four up = load_shared(reinterpret_cast<const Four*>(a.chunk(row + g, k)));
      const Four down = load_shared(reinterpret_cast<const Four*>(a.chunk(row + g + 8, k)));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Four left = load_shared(reinterpret_cast<const Four*>(b.chunk(column + 8 * n + 2 * t, k)));
        const Four right = load_shared(reinterpret_cast<const Four*>(b.chunk(column + 8 * n + 2 * t + 1, k)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          c[n][0] += up.x[i] * left.x[i];
          c[n][1] += up.x[i] * right.x[i];
          c[n][2] += down.x[i] * left.x[i];
          c[n][3] += down.x[i] * right.x[i];
        }
      }
    }
  }
}

// c += P B: P 16 x 8 K in registers as an accumulator, 8 K rows of b from `row` on, its 8 N columns from
// `column` on. P is rounded to T.
template <class T, int B, int K, int N>
FASTLM_DEVICE void multiply_registers(float (&c)[N][4], const float (&p)[K][4], Tile<T, B> b, int row, int column) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    static_assert(K % 2 == 0 && N % 2 == 0);
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      const uint32_t x[4] = {pack(p[k][0], p[k][1], T{}), pack(p[k][2], p[k][3], T{}),
                             pack(p[k + 1][0], p[k + 1][1], T{}), pack(p[k + 1][2], p[k + 1][3], T{})};
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t y[4];
        ldmatrix_transposed(y, b.chunk(row + 8 * k + lane % 16, column / 8 + n + lane / 16));
        mma(c[n], x, y[0], y[1], T{});
        mma(c[n + 1], x, y[2], y[3], T{});
      }
    }
  } else {
    using Two = Pack<T, 2>;
    const int t = lane % 4;
#pragma unroll
    for (int k = 0; k < 8 * K; ++k) {
      const int from = lane - t + k % 8 / 2;
      const float up = __shfl_sync(kAllLanes, p[k / 8][k % 2], from);
      const float down = __shfl_sync(kAllLanes, p[k / 8][2 + k % 2], from);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Two y = load_shared(reinterpret_cast<const Two*>(b.at(row + k, column + 8 * n + 2 * t)));
        c[n][0] += up * y.x[0];
        c[n][1] += up * y.x[1];
        c[n][2] += down * y.x[0];
        c[n][3] += down * y.x[1];
      }
    }
  }
}

}  // namespace fastlm::cuda
