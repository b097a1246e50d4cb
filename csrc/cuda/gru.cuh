// One layer of a GRU on the GPU: what forward and backward share. The formulas stand in csrc/cpu/gru.h.
//
// A group of blocks walks through time for one direction and one or more tiles of 16 sequences; each of its
// blocks has a slice of the units, and keeps their recurrent weights in shared memory for the whole walk.
// Blocks of a group meet once a step (a group of one block: never) and hand one another a row of K values
// for each sequence, in the storage type as products take it: the states (forward), or the gradients of the
// gates (backward).
// Where the weights don't fit, each step is a launch, and weights come from L2.
//
// A tile is 16 sequences by 8 G rows of weights. Sequences are the rows of the mma, units its columns:
// slices come in eights of units, and up to 16 sequences share the weights that a warp has read. Warps
// share the K of a tile where a block has fewer tiles than warps; their sums meet in shared memory, and
// from there a thread has all sums of a cell (sequence, unit) in registers.
//
// Lane 4 g + t reads 16 bytes of row g, a chunk of K being four neighbouring vectors. Which k an mma takes
// for which is free as long as both factors agree, so the vectors are fragments as they stand.
//
// D directions, T steps, B sequences, H units, N rows (step, sequence) in time-major order; S storage type.
#pragma once
#include "device.cuh"

namespace fastlm::cuda {

inline constexpr int kGruWarps = 8, kGruThreads = 32 * kGruWarps, kGruRows = 16;
template <class S> inline constexpr int kGruChunk = 4 * kPerVector<S>;  // elements of K

// The walk, and how it is divided.
template <class S> struct GruWalk {
  int64_t T, B, H, N;
  int D;
  const int64_t* offsets;   // [T + 1], step t holds rows offsets[t] ... offsets[t + 1]; null: B each
  const int64_t* lengths;   // [row_tiles] steps of a tile's longest sequence; null: T
  const S* weights;         // [D][unit_tiles][chunks][G][32][kPerVector<S>], as gru_pack lays them out
  S* exchange;              // [2][D][16 row_tiles][chunks kGruChunk], zeros behind the rows and the K in use
  float* partial;           // [D][B][H / 8, rounded up][2] of the layer norm's sums, 8 units each
  uint32_t* arrived;        // [groups]
  int chunks, row_tiles, unit_tiles;
  int block_rows, block_units;  // tiles that a block has, but for the last ones
  int slices, split;            // blocks of a group; warps that share a tile: 2, 4 or 8
  int64_t step;  // of a launch that makes one
  int stage;     // of that step: 0, or 1 for what follows its meeting
};

// ---- products ------------------------------------------------------------------------------

// c[n] += rows up and down (g and g + 8 of a tile) times the weights of group n, over chunks first ... last.
// up and down point at this lane's vectors of chunk 0, w at that of its own place, 4 g + t.
template <bool kShared, class S, int G>
FASTLM_DEVICE void gru_multiply(float (&c)[G][4], const S* up, const S* down, const S* w, int first, int last) {
  constexpr int kVector = kPerVector<S>;
  const auto weights = [&](const S* p, auto type) {
    using V = decltype(type);
    if constexpr (kShared) return load_shared(reinterpret_cast<const V*>(p));
    else return load_global(reinterpret_cast<const V*>(p));
  };
  if constexpr (kTensorCores<S>) {
    using Words = Pack<uint32_t, 4>;
#pragma unroll 4
    for (int chunk = first; chunk < last; ++chunk) {
      const Words a = load_global(reinterpret_cast<const Words*>(up + chunk * kGruChunk<S>));
      const Words b = load_global(reinterpret_cast<const Words*>(down + chunk * kGruChunk<S>));
      const uint32_t low[4] = {a.x[0], b.x[0], a.x[1], b.x[1]}, high[4] = {a.x[2], b.x[2], a.x[3], b.x[3]};
#pragma unroll
      for (int n = 0; n < G; ++n) {
        const Words y = weights(w + (chunk * G + n) * 32 * kVector, Words{});
        mma(c[n], low, y.x[0], y.x[1], S{});
        mma(c[n], high, y.x[2], y.x[3], S{});
      }
    }
  } else {
    // The four lanes of a row share its K: each has a quarter of every chunk, for all units of the groups.
    using Four = Pack<float, 4>;
    const int t = lane_index() % 4;
    w -= lane_index() / 4 * 4 * kVector;  // at vector t of the first unit
    float part[G][8][2] = {};
#pragma unroll(kShared ? 2 : 1)
    for (int chunk = first; chunk < last; ++chunk) {
      const Four a = load_global(reinterpret_cast<const Four*>(up + chunk * kGruChunk<S>));
      const Four b = load_global(reinterpret_cast<const Four*>(down + chunk * kGruChunk<S>));
#pragma unroll
      for (int n = 0; n < G; ++n) {
#pragma unroll
        for (int u = 0; u < 8; ++u) {
          const Four y = weights(w + ((chunk * G + n) * 32 + 4 * u) * kVector, Four{});
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            part[n][u][0] += a.x[i] * y.x[i];
            part[n][u][1] += b.x[i] * y.x[i];
          }
        }
      }
    }
    // Halves change hands twice, and lane t is left with the sums of units 2 t and 2 t + 1.
    const auto give = [](bool upper, float lower_half, float upper_half, int turn) {
      return (upper ? upper_half : lower_half) +
             __shfl_xor_sync(kAllLanes, upper ? lower_half : upper_half, turn);
    };
#pragma unroll
    for (int n = 0; n < G; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float half[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) half[u] = give(t >= 2, part[n][u][r], part[n][u + 4][r], 2);
#pragma unroll
        for (int u = 0; u < 2; ++u) c[n][2 * r + u] += give(t % 2, half[u], half[u + 2], 1);
      }
    }
  }
}

// ---- a block's share -----------------------------------------------------------------------

struct GruTile {
  int row, unit;   // tile of sequences, tile of units
  int first_warp;  // of those that share it
  bool used;
};

// A sequence and a unit of a tile: its place among the 128 of a group of weights.
struct GruCell {
  int64_t b;
  int unit, group, place;
  bool row_used;  // there is such a sequence, which goes on at this step
  bool used;      // and such a unit
};

template <class S, int G, int kUnits, bool kResident> struct GruBlock {
  static constexpr int kCells = kUnits / 8 * 2;  // most of a thread for one tile, which two warps share
  static constexpr int kGroup = 128;             // cells of 16 sequences and 8 units
  static constexpr size_t kSums = size_t(kGruWarps) * G * kGroup * sizeof(float);

  const GruWalk<S>& p;
  int d;                // direction
  int64_t group;
  int row_tile, rows;   // first tile, number of tiles
  int unit_tile, units;
  int rounds;           // in which the warps make the tiles
  int64_t steps;        // of the group's longest sequence
  uint32_t met = 0;
  float* sums;          // [warps][G][16][8]
  const S* weights;     // [units][chunks][G][32][kPerVector<S>]

  FASTLM_DEVICE explicit GruBlock(const GruWalk<S>& walk) : p(walk) {
    const int slice = int(blockIdx.x % p.slices);
    group = blockIdx.x / p.slices;
    d = int(group % p.D);
    row_tile = int(group / p.D) * p.block_rows;
    rows = min(p.block_rows, p.row_tiles - row_tile);
    unit_tile = slice * p.block_units;
    units = min(p.block_units, p.unit_tiles - unit_tile);
    const int at_once = kGruWarps / p.split;
    rounds = (rows * units + at_once - 1) / at_once;
    steps = p.lengths ? p.lengths[row_tile] : p.T;
    const int64_t tile = int64_t(p.chunks) * G * 32 * kPerVector<S>;
    weights = p.weights + (int64_t(d) * p.unit_tiles + unit_tile) * tile;
    sums = reinterpret_cast<float*>(shared_memory());
    if constexpr (kResident) {
      S* const kept = reinterpret_cast<S*>(shared_memory() + kSums);
      for (int64_t i = threadIdx.x; i < units * tile / kPerVector<S>; i += kGruThreads)
        cp_async(kept + i * kPerVector<S>, weights + i * kPerVector<S>, true);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      weights = kept;
    }
  }

  // The group's blocks see what each has written.
  FASTLM_DEVICE void meet() {
    if (p.slices == 1) __syncthreads();
    else grid_barrier(p.arrived + group, met++, uint32_t(p.slices));
  }

  // Sequences that step t holds; none before the first and behind the last.
  FASTLM_DEVICE int64_t active(int64_t t) const {
    if (t < 0 || t >= p.T) return 0;
    return p.offsets ? p.offsets[t + 1] - p.offsets[t] : p.B;
  }
  FASTLM_DEVICE int64_t first_row(int64_t t) const { return p.offsets ? p.offsets[t] : t * p.B; }
  FASTLM_DEVICE int64_t first_sequence() const { return int64_t(row_tile) * kGruRows; }

  FASTLM_DEVICE S* exchange_row(int64_t buffer, int64_t b) const {
    const int64_t rows = int64_t(p.row_tiles) * kGruRows;
    return p.exchange + ((buffer * p.D + d) * rows + b) * p.chunks * kGruChunk<S>;
  }
  FASTLM_DEVICE float* partial_row(int64_t b) const {
    return p.partial + (d * p.B + b) * ((p.H + 7) / 8) * 2;
  }

  // Neighbouring warps share the sequences, whose rows they find in L1.
  FASTLM_DEVICE GruTile tile_at(int round) const {
    const int i = round * (kGruWarps / p.split) + warp_index() / p.split;
    return {row_tile + i / units, unit_tile + i % units, warp_index() / p.split * p.split, i < rows * units};
  }

  // Sums of this warp's share of a tile's K, to shared memory; zeros where none of its sequences goes on.
  FASTLM_DEVICE void multiply(const GruTile& tile, int64_t buffer, int64_t active) const {
    const int lane = lane_index(), g = lane / 4, t = lane % 4, part = warp_index() % p.split;
    float c[G][4] = {};
    if (tile.used && int64_t(tile.row) * kGruRows < active) {
      const S* const up = exchange_row(buffer, int64_t(tile.row) * kGruRows + g) + t * kPerVector<S>;
      const int64_t below = int64_t(8) * p.chunks * kGruChunk<S>;
      const int64_t size = int64_t(p.chunks) * G * 32 * kPerVector<S>;
      const S* const w = weights + (tile.unit - unit_tile) * size + lane * kPerVector<S>;
      gru_multiply<kResident>(c, up, up + below, w, p.chunks * part / p.split, p.chunks * (part + 1) / p.split);
    }
    using Two = Pack<float, 2>;
    float* const to = sums + warp_index() * G * kGroup + g * 8 + 2 * t;
#pragma unroll
    for (int n = 0; n < G; ++n) {
      store_shared(reinterpret_cast<Two*>(to + n * kGroup), Two{{c[n][0], c[n][1]}});
      store_shared(reinterpret_cast<Two*>(to + n * kGroup + 64), Two{{c[n][2], c[n][3]}});
    }
  }

  // The sum of a cell in group n of the weights.
  FASTLM_DEVICE float sum(const GruTile& tile, int n, int place) const {
    float all = 0;
    for (int w = tile.first_warp; w < tile.first_warp + p.split; ++w)
      all += load_shared(sums + (w * G + n) * kGroup + place);
    return all;
  }

  // Calls f(i, cell) for the cells of a tile that are this thread's; whole warps, eight lanes in a row.
  template <class F> FASTLM_DEVICE void each_cell(const GruTile& tile, int64_t active, const F& f) const {
    const int thread = int(threadIdx.x) - 32 * tile.first_warp;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int cell = i * 32 * p.split + thread;
      if (cell < kUnits / 8 * kGroup) {
        const int place = cell % kGroup, group = cell / kGroup;
        const int64_t b = int64_t(tile.row) * kGruRows + place / 8;
        const int unit = tile.unit * kUnits + group * 8 + place % 8;
        const bool row_used = tile.used && b < active;
        f(i, GruCell{b, unit, group, place, row_used, row_used && unit < p.H});
      }
    }
  }
};

// ---- packing -------------------------------------------------------------------------------

template <class S> struct GruPackParams {
  const S* w[2];  // of each direction, element (row, k) at row row_stride + k k_stride
  S* packed;      // [D][unit_tiles][chunks][G][32][kPerVector<S>]
  int64_t row_stride, k_stride, H, K;
  int D, G, unit_tiles, chunks;
  bool by_gate;   // group n of a tile has 8 units of gate n; else 8 units each
  const S* b_ih[2];
  const S* b_hh[2];
  float* bias;    // [D][4][H] what enters r, z, n and q; or null
  const S* h0;    // [D][B][H], or null: the states that the exchange begins with
  S* exchange;    // [2][D][rows][chunks kGruChunk]
  int64_t B, rows;

  __host__ __device__ int64_t vectors() const { return int64_t(D) * unit_tiles * chunks * G * 32; }
  __host__ __device__ int64_t biases() const { return bias ? 4 * D * H : 0; }
  __host__ __device__ int64_t states() const { return h0 ? 2 * D * B * H : 0; }
  __host__ __device__ int64_t items() const { return vectors() + biases() + states(); }
};

// Of the rows of a tile, lane 4 i + t has vector t of row i. Zeros behind the last unit and the last k.
template <class S> FASTLM_DEVICE void gru_pack_vector(const GruPackParams<S>& p, int64_t at) {
  int64_t i = at / 32;
  const int64_t n = i % p.G, chunk = (i /= p.G) % p.chunks, tile = (i /= p.chunks) % p.unit_tiles;
  const S* const w = p.w[i / p.unit_tiles];
  const int64_t unit = (p.by_gate ? tile : tile * p.G + n) * 8 + at % 32 / 4;
  const int64_t row = unit + (p.by_gate ? n * p.H : 0), k = (chunk * 4 + at % 4) * kPerVector<S>;
  Pack<S, kPerVector<S>> v;
#pragma unroll
  for (int j = 0; j < kPerVector<S>; ++j)
    v.x[j] = unit < p.H && k + j < p.K ? operand(w[row * p.row_stride + (k + j) * p.k_stride]) : S{};
  store_global(reinterpret_cast<Pack<S, kPerVector<S>>*>(p.packed + at * kPerVector<S>), v);
}

template <class S> FASTLM_DEVICE void gru_pack_one(const GruPackParams<S>& p) {
  int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < p.vectors()) return gru_pack_vector(p, i);
  i -= p.vectors();
  if (i < p.biases()) {
    const int64_t unit = i % p.H, gate = i / p.H % 4, d = i / (4 * p.H);
    const S *const in = p.b_ih[d], *const hidden = p.b_hh[d];
    p.bias[i] = gate == 3 ? widen(hidden[2 * p.H + unit])
                          : widen(in[gate * p.H + unit]) + (gate < 2 ? widen(hidden[gate * p.H + unit]) : 0);
    return;
  }
  i -= p.biases();
  if (i >= p.states()) return;
  const int64_t unit = i % p.H, b = i / p.H % p.B, row = i / (p.H * p.B);  // row: buffer and direction
  p.exchange[(row * p.rows + b) * p.chunks * kGruChunk<S> + unit] = operand(p.h0[(row % p.D * p.B + b) * p.H + unit]);
}

template <class S> __global__ void __launch_bounds__(256) gru_pack(const __grid_constant__ GruPackParams<S> p) {
  if constexpr (kServed<S>) gru_pack_one(p);
}

}  // namespace fastlm::cuda
