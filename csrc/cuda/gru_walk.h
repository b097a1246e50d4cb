// The host's part of a GRU's walk through time (gru.cuh): how it is divided among blocks, its memory, and
// its launches.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "../gru_call.h"
#include "gru.cuh"
#include "launch.h"

namespace fastlm::cuda::gru {

// Carves an allocation; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class E> E* take(int64_t n) {
    used = ceil_div(used, 256) * 256;
    E* const p = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += n * int64_t(sizeof(E));
    return p;
  }
};

// ---- division of the work ------------------------------------------------------------------

// How a walk is launched: by groups of one block, by groups whose blocks meet, or step by step.
enum class Plan { alone, together, steps };

// A block reads so much of its slice in about the time of a meeting (some 1.3 us: at 128 bytes a clock; in
// float32, where each weight takes 16 multiply-adds a tile, in more).
template <class S> inline constexpr size_t kAlone = kTensorCores<S> ? 96 << 10 : 48 << 10;

// FASTLM_GRU_PLAN forces one of the plans, for tests and measurements.
inline std::optional<Plan> forced_plan(const char* op) {
  const char* const given = std::getenv("FASTLM_GRU_PLAN");
  if (!given || !*given) return std::nullopt;
  if (!std::strcmp(given, "alone")) return Plan::alone;
  if (!std::strcmp(given, "together")) return Plan::together;
  if (!std::strcmp(given, "steps")) return Plan::steps;
  STD_TORCH_CHECK(false, "fastlm::", op, ": FASTLM_GRU_PLAN is ", given, ", expected alone, together or steps");
}

// The walk through one layer in one direction of time: tiles of 8 G rows of weights over K.
template <class S, int G, int kUnits> struct Walk {
  using Block = GruBlock<S, G, kUnits, true>;

  Device& device;
  const char* op;
  GruWalk<S> w{};
  Plan plan = Plan::steps;
  int64_t groups = 0;
  size_t shared = 0;  // bytes of a block
  std::vector<int64_t> lengths;

  Walk(Device& device, const GruCall& call, int64_t K) : device(device), op(call.op) {
    const GruParams& p = call.p;
    w.T = p.T;
    w.B = p.B;
    w.H = p.H;
    w.N = p.N;
    w.D = int(p.D);
    w.chunks = int(ceil_div(K, kGruChunk<S>));
    w.row_tiles = int(ceil_div(p.B, kGruRows));
    w.unit_tiles = int(ceil_div(p.H, kUnits));
    if (p.N == p.T * p.B) return;
    for (int64_t tile = 0, t = p.T; tile < w.row_tiles; ++tile) {
      while (t > 0 && p.offsets[t] - p.offsets[t - 1] <= tile * kGruRows) --t;
      lengths.push_back(t);
    }
  }

  size_t tile_bytes() const { return size_t(w.chunks) * G * 32 * 16; }
  int64_t exchange_rows() const { return int64_t(w.row_tiles) * kGruRows; }
  int64_t exchange_size() const { return 2 * w.D * exchange_rows() * w.chunks * kGruChunk<S>; }
  int64_t packed_size() const { return w.D * w.unit_tiles * int64_t(tile_bytes() / sizeof(S)); }
  dim3 grid() const { return dim3(unsigned(groups * w.slices)); }

  void divide(int block_rows, int block_units) {
    w.block_rows = block_rows;
    w.block_units = block_units;
    w.slices = int(ceil_div(w.unit_tiles, block_units));
    groups = w.D * ceil_div(w.row_tiles, block_rows);
    shared = Block::kSums + (plan == Plan::steps ? 0 : tile_bytes() * size_t(block_units));
    w.split = kGruWarps;
    while (w.split > 2 && int64_t(block_rows) * block_units * w.split > kGruWarps) w.split /= 2;
  }

  // Products with the state come to all units of a group before its next step, so that each block reads all
  // of the states: few wide slices move less than many narrow ones, and the widest that keep all
  // multiprocessors busy are taken. More tiles of sequences a block only where slices don't fit otherwise.
  template <class Kernel> void choose(Kernel kernel) {
    const auto forced = forced_plan(op);
    const auto allowed = [&](Plan one) { return !forced || forced == one; };
    const auto most = int64_t((device.shared_bytes - Block::kSums) / tile_bytes());
    const bool short_read = forced || w.unit_tiles * tile_bytes() <= kAlone<S>;
    if (w.unit_tiles <= most && short_read && allowed(Plan::alone)) {
      plan = Plan::alone;
      return divide(1, w.unit_tiles);
    }
    if (allowed(Plan::together)) {
      plan = Plan::together;
      for (int rows = 1;; rows = std::min(2 * rows, w.row_tiles)) {
        const int64_t slices = device.multiprocessors / (w.D * ceil_div(w.row_tiles, rows));
        const int64_t units = slices ? ceil_div(w.unit_tiles, slices) : most + 1;
        if (units <= most) {
          divide(rows, int(units));
          if (device.blocks_at_once(kernel, kGruThreads, shared) >= groups * w.slices) return;
        }
        if (rows == w.row_tiles) break;
      }
    }
    STD_TORCH_CHECK(allowed(Plan::steps), "fastlm::", op, ": FASTLM_GRU_PLAN does not fit this call");
    plan = Plan::steps;
    const int rows = std::min(w.row_tiles, 4);
    const int64_t tiles = w.unit_tiles * w.D * ceil_div(w.row_tiles, rows);
    divide(rows, int(std::clamp<int64_t>(tiles / device.multiprocessors, 1, 4)));
  }

  // What every walk needs; the exchange and the counters come first, and are zeros.
  void take(Arena& arena, bool layer_norm) {
    w.exchange = arena.take<S>(exchange_size());
    w.arrived = arena.take<uint32_t>(groups);
    w.weights = arena.take<S>(packed_size());
    w.partial = arena.take<float>(layer_norm ? w.D * w.B * ceil_div(w.H, 8) * 2 : 0);
    if (lengths.empty()) return;
    int64_t* const offsets = arena.take<int64_t>(w.T + 1);
    w.offsets = offsets;
    w.lengths = arena.take<int64_t>(w.row_tiles);
  }
  void prepare(const GruCall& call) {
    device.zero(w.exchange, size_t(reinterpret_cast<char*>(w.arrived + groups) - reinterpret_cast<char*>(w.exchange)));
    if (lengths.empty()) return;
    copy_in(device, const_cast<int64_t*>(w.offsets), call.offsets);
    copy_in(device, const_cast<int64_t*>(w.lengths), lengths);
  }

  void set(GruPackParams<S>& p, const GruCall& call) const {
    for (int d = 0; d < w.D; ++d) p.w[d] = static_cast<const S*>(call.p.weights[d].w_hh);
    p.packed = const_cast<S*>(w.weights);
    p.H = w.H;
    p.D = w.D;
    p.G = G;
    p.unit_tiles = w.unit_tiles;
    p.chunks = w.chunks;
    p.exchange = w.exchange;
    p.B = w.B;
    p.rows = exchange_rows();
  }

  // `steps` steps; with layer norm each has a second stage, but for one behind the last.
  template <class P>
  void launch(void (*whole)(P), void (*step)(P), P p, int64_t steps, bool layer_norm) {
    p.walk = w;
    if (plan == Plan::alone) return device.launch(whole, grid(), kGruThreads, shared, p);
    if (plan == Plan::together) return device.launch_together(whole, grid(), kGruThreads, shared, p);
    for (p.walk.step = 0; p.walk.step < steps; ++p.walk.step)
      for (p.walk.stage = 0; p.walk.stage < (layer_norm && p.walk.step < w.T ? 2 : 1); ++p.walk.stage)
        device.launch(step, grid(), kGruThreads, shared, p);
  }
};

}  // namespace fastlm::cuda::gru
