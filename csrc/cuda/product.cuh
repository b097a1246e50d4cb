// Tiles in shared memory and the two matrix products of a warp that attention, GRU and losses are made
// of, for 16-bit types and tf32 on tensor cores and for float32 by multiply-adds, with the same fragments.
//
// An accumulator is c[N][4], N tiles of 16 x 8 side by side, as mma leaves them: with g = lane / 4 and
// t = lane % 4, c[n][0] is at (g, 8 n + 2 t), c[n][1] in the next column, c[n][2] and c[n][3] 8 rows below.
#pragma once
#include "device.cuh"

namespace fastlm::cuda {

// Rows of COLUMNS elements in 16-byte chunks. A chunk's place in its row is turned by the row's number,
// so that the same chunk of 8 neighbouring rows, and 8 neighbouring chunks of a row, lie in all banks.
template <class T, int COLUMNS> struct Tile {
  static constexpr int kChunks = COLUMNS / kPerVector<T>, kRowBytes = COLUMNS * sizeof(T);
  static_assert(COLUMNS % kPerVector<T> == 0 && (kChunks & (kChunks - 1)) == 0 && kChunks >= 2);
  static constexpr size_t bytes(int rows) { return size_t(rows) * kRowBytes; }

  T* data;

  static constexpr FASTLM_DEVICE uint32_t turn(uint32_t row) {
    constexpr int kTurns = kChunks < 8 ? kChunks : 8;
    return row / (8 / kTurns) % kTurns;
  }
  // Bytes to a chunk. Rows 8 n further down lie 8 n kRowBytes behind.
  static FASTLM_DEVICE uint32_t offset(int row, int c) {
    return uint32_t(row) * kRowBytes + (uint32_t(c) ^ turn(uint32_t(row))) * 16;
  }
  // Bytes to chunk c ^ x of a row out of those to c: a loop reaches all chunks by constants. Only the BITS
  // low bits of c's place differ between lanes, the others are 0 where they are in x.
  template <int BITS = 3> static FASTLM_DEVICE uint32_t moved(uint32_t offset, uint32_t x) {
    constexpr uint32_t kLow = (1u << BITS) - 1;
    return (offset ^ 16 * (x & kLow)) + 16 * (x & ~kLow);
  }
  FASTLM_DEVICE T* behind(uint32_t bytes) const {
    return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(data) + bytes);
  }
  FASTLM_DEVICE T* chunk(int row, int c) const { return behind(offset(row, c)); }
  FASTLM_DEVICE T* at(int row, int column) const {
    return chunk(row, column / kPerVector<T>) + column % kPerVector<T>;
  }
};

// Starts copies of ROWS rows from global memory, row_stride elements apart, by all THREADS of the block;
// zeros from row `rows` and from column `columns` (a multiple of a chunk) on. Rows start at 16 bytes.
template <int ROWS, int THREADS, class Rows, class T>
FASTLM_DEVICE void copy_tile(Rows tile, const T* from, int64_t row_stride, int rows, int columns) {
  constexpr int kChunks = Rows::kChunks, kAcross = kChunks < THREADS ? kChunks : THREADS;
  constexpr int kAtOnce = THREADS / kAcross;
  static_assert(THREADS % kAcross == 0 && kChunks % kAcross == 0);
#pragma unroll
  for (int side = 0; side < kChunks / kAcross; ++side) {
    const int c = side * kAcross + int(threadIdx.x) % kAcross, mine = int(threadIdx.x) / kAcross;
    const T* next = from + mine * row_stride + c * kPerVector<T>;
    const bool inside = c * kPerVector<T> < columns;
#pragma unroll kCopiesUnrolled
    for (int n = 0; n < (ROWS + kAtOnce - 1) / kAtOnce; ++n) {
      const int row = mine + n * kAtOnce;
      if (ROWS % kAtOnce == 0 || row < ROWS) cp_async(tile.chunk(row, c), next, inside && row < rows);
      next += kAtOnce * row_stride;
    }
  }
}

// c += A B^T: 16 M rows of a from `row` on, 8 N rows of b from `column` on (both multiples of 8), over the
// first K columns of either. Each fragment of b serves all M tiles.
template <int K, class T, int A, int B, int M, int N>
FASTLM_DEVICE void multiply_rows(float (&c)[M][N][4], Tile<T, A> a, int row, Tile<T, B> b, int column) {
  constexpr uint32_t kA = Tile<T, A>::kRowBytes, kB = Tile<T, B>::kRowBytes;
  const int lane = lane_index();
  if constexpr (kTensorCores<T>) {
    constexpr int kStep = 2 * kPerVector<T>;
    static_assert(K % kStep == 0 && N % 2 == 0);
    const uint32_t in_a = a.offset(row + lane % 16, lane / 16);
    const uint32_t in_b = b.offset(column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll 4
    for (uint32_t k = 0; k < K / kStep; ++k) {
      uint32_t x[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ldmatrix(x[m], a.behind(a.moved(in_a, 2 * k) + 16 * m * kA));
        to_operands(x[m], T{});
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t y[4];
        ldmatrix(y, b.behind(b.moved(in_b, 2 * k) + 8 * n * kB));
        to_operands(y, T{});
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma(c[m][n], x[m], y[0], y[1], T{});
          mma(c[m][n + 1], x[m], y[2], y[3], T{});
        }
      }
    }
  } else {
    using Four = Pack<T, 4>;
    const int g = lane / 4, t = lane % 4;
    const uint32_t in_a = a.offset(row + g, 0), in_b = b.offset(column + 2 * t, 0);
    const uint32_t in_next = b.offset(column + 2 * t + 1, 0);
#pragma unroll 4
    for (uint32_t k = 0; k < K / 4; ++k) {
      Four up[M], down[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        up[m] = load_shared(reinterpret_cast<const Four*>(a.behind((in_a ^ 16 * k) + 16 * m * kA)));
        down[m] = load_shared(reinterpret_cast<const Four*>(a.behind((in_a ^ 16 * k) + (16 * m + 8) * kA)));
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Four left = load_shared(reinterpret_cast<const Four*>(b.behind((in_b ^ 16 * k) + 8 * n * kB)));
        const Four right = load_shared(reinterpret_cast<const Four*>(b.behind((in_next ^ 16 * k) + 8 * n * kB)));
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c[m][n][0] += up[m].x[i] * left.x[i];
            c[m][n][1] += up[m].x[i] * right.x[i];
            c[m][n][2] += down[m].x[i] * left.x[i];
            c[m][n][3] += down[m].x[i] * right.x[i];
          }
        }
      }
    }
  }
}
template <int K, class T, int A, int B, int N>
FASTLM_DEVICE void multiply_rows(float (&c)[N][4], Tile<T, A> a, int row, Tile<T, B> b, int column) {
  multiply_rows<K>(reinterpret_cast<float (&)[1][N][4]>(c), a, row, b, column);
}

// c += P B: P 16 M x 8 K in registers as M accumulators, 8 K rows of b from `row` (a multiple of 8) on, of
// these the 8 N columns from `column` (a multiple of 8 N, N a power of 2, where not 0) on. P is rounded to T.
template <class T, int B, int M, int K, int N>
FASTLM_DEVICE void multiply_registers(float (&c)[M][N][4], const float (&p)[M][K][4], Tile<T, B> b, int row,
                                      int column) {
  constexpr uint32_t kB = Tile<T, B>::kRowBytes;
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    static_assert(K % 2 == 0 && N % 2 == 0);
    const uint32_t in_b = b.offset(row + lane % 16, column / 8 + lane / 16);
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      uint32_t x[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][i] = pack(p[m][k + i / 2][i % 2 * 2], p[m][k + i / 2][i % 2 * 2 + 1], T{});
      }
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t y[4];
        ldmatrix_transposed(y, b.behind(b.moved(in_b, n) + 8 * k * kB));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma(c[m][n], x[m], y[0], y[1], T{});
          mma(c[m][n + 1], x[m], y[2], y[3], T{});
        }
      }
    }
  } else if constexpr (kTensorCores<T>) {
    // Columns 2 t and 2 t + 1 of a tile of P, and those rows of b, are k = t and k = t + 4.
    const int g = lane / 4, t = lane % 4;
    const uint32_t upper = b.offset(row + 2 * t, column / 4 + g / 4) + g % 4 * 4;
    const uint32_t lower = b.offset(row + 2 * t + 1, column / 4 + g / 4) + g % 4 * 4;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t x[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][i] = __float_as_uint(p[m][k][i / 2 + i % 2 * 2]);
        to_operands(x[m], T{});
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const auto word = [&](uint32_t at) {
          return load_shared(reinterpret_cast<const uint32_t*>(b.behind(b.moved(at, 2 * n) + 8 * k * kB)));
        };
        uint32_t y[2] = {word(upper), word(lower)};
        to_operands(y, T{});
#pragma unroll
        for (int m = 0; m < M; ++m) mma(c[m][n], x[m], y[0], y[1], T{});
      }
    }
  } else {
    using Two = Pack<T, 2>;
    const int t = lane % 4;
    const uint32_t in_b = b.offset(row, column / 4 + t / 2) + t % 2 * 8;
#pragma unroll
    for (int k = 0; k < 8 * K; ++k) {
      const int from = lane - t + k % 8 / 2;
      float up[M], down[M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        up[m] = __shfl_sync(kAllLanes, p[m][k / 8][k % 2], from);
        down[m] = __shfl_sync(kAllLanes, p[m][k / 8][2 + k % 2], from);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint32_t at = b.template moved<1>(in_b, 2 * n ^ b.turn(k)) + k * kB;
        const Two y = load_shared(reinterpret_cast<const Two*>(b.behind(at)));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          c[m][n][0] += up[m] * y.x[0];
          c[m][n][1] += up[m] * y.x[1];
          c[m][n][2] += down[m] * y.x[0];
          c[m][n][3] += down[m] * y.x[1];
        }
      }
    }
  }
}
template <class T, int B, int K, int N>
FASTLM_DEVICE void multiply_registers(float (&c)[N][4], const float (&p)[K][4], Tile<T, B> b, int row, int column) {
  multiply_registers(reinterpret_cast<float (&)[1][N][4]>(c), reinterpret_cast<const float (&)[1][K][4]>(p), b, row,
                     column);
}

// ---- of warpgroups -------------------------------------------------------------------------

// ROWS rows of COLUMNS 16-bit elements as wgmma reads them: side by side in panels of 64 columns. From 1024 bytes on.
template <class T, int COLUMNS, int ROWS> struct Panels {
  using Panel = Tile<T, 64>;
  static constexpr int kRows = ROWS, kChunks = COLUMNS / 8;
  static constexpr size_t kPanelBytes = Panel::bytes(ROWS), kBytes = COLUMNS / 64 * kPanelBytes;
  static_assert(sizeof(T) == 2 && COLUMNS % 64 == 0 && ROWS % 8 == 0);

  T* data;

  FASTLM_DEVICE T* chunk(int row, int c) const {
    return Panel{data + c / Panel::kChunks * ROWS * 64}.chunk(row, c % Panel::kChunks);
  }
  FASTLM_DEVICE T* at(int row, int column) const { return chunk(row, column / 8) + column % 8; }
  // From `row` on, a multiple of 8.
  FASTLM_DEVICE uint64_t descriptor(int row) const { return matrix_descriptor(data + row * 64, kPanelBytes); }
};

// Starts C = A B^T: of a, the warpgroup's 64 rows in registers, all columns; 8 N rows of b from `row` on.
template <class T, int K, int ROWS, int N>
FASTLM_DEVICE void start_rows(float (&c)[N][4], const uint32_t (&a)[K / 16][4], Panels<T, K, ROWS> b, int row) {
  const uint64_t from = b.descriptor(row);
#pragma unroll
  for (int k = 0; k < K / 16; ++k)
    wgmma<false>(c, a[k], part_of_matrix(from, k / 4 * b.kPanelBytes + k % 4 * 32), k > 0, T{});
}

// Starts C += P B: of P, the warpgroup's 64 rows in registers, K columns for the rows of b from `row` on.
template <class T, int COLUMNS, int ROWS, int K>
FASTLM_DEVICE void start_columns(float (&c)[COLUMNS / 8][4], const uint32_t (&p)[K][4], Panels<T, COLUMNS, ROWS> b,
                                 int row) {
  const uint64_t from = b.descriptor(row);
#pragma unroll
  for (int k = 0; k < K; ++k) wgmma<true>(c, p[k], part_of_matrix(from, k * 16 * 128), true, T{});
}

}  // namespace fastlm::cuda
