// Attention's backward on a GPU, the host's part: launches of its kernels. Each dtype has a file of its own
// (attention_backward_*.cu), for they take the compiler long.
#pragma once
#include "attention_backward.cuh"
#include "attention_bias_backward.cuh"
#include "launch.h"
#include "tensors.h"

namespace fastlm::cuda {

// Everything but the sizes that a launch chooses. needs_mask, needs_slopes: p.dmask, p.dslopes are filled.
struct BackwardCall {
  const char* op;
  const Tensor& query;
  std::vector<Tensor>& held;  // memory for as long as the call lasts
  Device& device;
  bool needs_mask = false, needs_slopes = false;
  AttentionBackwardParams p{};

  float* floats(int64_t n) {
    held.push_back(new_like(query, {n}, ScalarType::Float));
    return static_cast<float*>(held.back().mutable_data_ptr());
  }
  dim3 grid(int64_t blocks, int64_t parts = 1) const {
    STD_TORCH_CHECK(blocks <= 0x7fffffff, "fastlm::", op, ": ", blocks, " blocks, more than a grid has");
    return dim3(unsigned(blocks), unsigned(parts));
  }
  int64_t heads() const { return int64_t(p.a.B) * p.a.Hkv; }
};

inline constexpr size_t kSmallShared = 96 * 1024;  // devices with less run the shapes for it
inline constexpr int kMostParts = 16;

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T> void sum_parts(BackwardCall& call, const float* from, void* out, int64_t size, int parts) {
  call.device.launch(&attention_sum_parts<T>, call.grid(blocks_of(size, kPartsThreads)), kPartsThreads, 0,
                     PartsParams{from, out, size, parts});
}

// Two stages, unless one lets more blocks run at once.
template <class S, class K> size_t divide_shared(BackwardCall& call, K kernel, int tiles) {
  const size_t one = S::shared_bytes(tiles, 1), two = S::shared_bytes(tiles, 2);
  const auto at_once = [&](size_t bytes) { return call.device.blocks_at_once(kernel, S::kThreads, bytes); };
  call.p.stages = two <= call.device.shared_bytes && at_once(two) >= at_once(one) ? 2 : 1;
  return call.p.stages == 2 ? two : one;
}

template <class S, bool DK, bool DV> void run_keys(BackwardCall& call) {
  const auto kernel = &attention_backward_keys<S, DK, DV>;
  const size_t shared = divide_shared<S>(call, kernel, DK ? 2 : 1);
  call.device.launch(kernel, call.grid(call.heads() * call.p.blocks, call.p.parts), S::kThreads, shared, call.p);
}

// dK and dV. Where there are few blocks of keys for the device, the rows of each are shared out: where the first keys
// have all of the rows and the last have none, among twice as many.
template <class T, int D, bool OPTIONS, bool SMALL> void run_keys(BackwardCall& call) {
  using S = BackwardShape<T, D, true, OPTIONS, SMALL>;
  AttentionBackwardParams& p = call.p;
  p.blocks = int(blocks_of(p.a.Tk, S::kStay));
  const int64_t blocks = call.heads() * p.blocks, tiles = blocks_of(int64_t(p.a.Tq) * p.a.group, S::kStream);
  if (blocks == 0) return;
  const bool triangle = (p.a.causal || p.a.right >= 0) && p.a.left < 0;
  const int64_t parts = (triangle ? 4 : 2) * call.device.multiprocessors / blocks;
  p.parts = int(std::clamp<int64_t>(std::min(parts, tiles / 4), 1, kMostParts));
  p.together = heads_together(p.a, int64_t(p.a.Tq) * p.a.group, sizeof(T));
  if (p.parts > 1) {
    p.dk_parts = call.floats(p.parts * (p.dk_size + p.dv_size));
    p.dv_parts = p.dk_parts + p.parts * p.dk_size;
    // Keys of no sequence have a gradient of 0.
    if (p.a.cu_q) call.device.zero(p.dk_parts, size_t(p.parts * (p.dk_size + p.dv_size)) * sizeof(float));
  }
  if constexpr (D == 256) {
    run_keys<S, true, false>(call);
    run_keys<S, false, true>(call);
  } else {
    run_keys<S, true, true>(call);
  }
  if (p.parts > 1) {
    sum_parts<stored_t<T>>(call, p.dk_parts, p.dk, p.dk_size, p.parts);
    sum_parts<stored_t<T>>(call, p.dv_parts, p.dv, p.dv_size, p.parts);
  }
}

// dQ, or the sums over keys that p.sums asks for.
template <class T, int D, bool OPTIONS, bool SMALL> void run_rows(BackwardCall& call) {
  using S = BackwardShape<T, D, false, OPTIONS, SMALL>;
  call.p.blocks = int(blocks_of(int64_t(call.p.a.Tq) * call.p.a.group, S::kStay));
  call.p.together = heads_together(call.p.a, call.p.a.Tk, sizeof(T));
  const auto kernel = &attention_backward_rows<S>;
  const size_t shared = divide_shared<S>(call, kernel, 2);
  call.device.launch(kernel, call.grid(call.heads() * call.p.blocks), S::kThreads, shared, call.p);
}

template <class T> void run_mask(BackwardCall& call) {
  AttentionBackwardParams& p = call.p;
  const int64_t heads = int64_t(p.mask_B) * p.mask_H, size = heads * p.mask_Tq * p.mask_Tk;
  const int64_t tiles = heads * blocks_of(p.mask_Tq, kMaskRows) * blocks_of(p.mask_Tk, kMaskKeys);
  const int64_t all = int64_t(p.a.B) * p.a.Hq * blocks_of(p.a.Tq, kMaskRows) * blocks_of(p.a.Tk, kMaskKeys);
  float* const dmask = p.dmask;
  p.parts = int(std::clamp<int64_t>(std::min(4 * call.device.multiprocessors / tiles, all / tiles), 1, 1024));
  if (p.parts > 1) p.dmask = call.floats(p.parts * size);
  p.sums = kMaskSums;
  call.device.launch(&attention_mask_backward<T>, call.grid(tiles * p.parts), kMaskThreads, MaskShape<T>::kSharedBytes, p);
  if (p.parts > 1) sum_parts<float>(call, p.dmask, dmask, size, p.parts);
}

template <class T, int D, bool OPTIONS, bool SMALL> void run_all(BackwardCall& call) {
  AttentionBackwardParams& p = call.p;
  p.blocks = int(blocks_of(int64_t(p.a.Tq) * p.a.group, kStatsRows));
  call.device.launch(&attention_row_stats<stored_t<T>>, call.grid(call.heads() * p.blocks), kStatsThreads, 0, p);
  if constexpr (OPTIONS) {
    if (kTensorCores<T> && (call.needs_mask || call.needs_slopes)) {
      p.sums = kDeltaSums;  // their float32 would show how products were rounded
      run_rows<T, D, true, SMALL>(call);
    }
    if (call.needs_slopes) {
      p.sums = kSlopeSums;
      p.row_sums = call.floats(p.a.B * p.stats_b);
      run_rows<T, D, true, SMALL>(call);
      call.device.launch(&attention_head_backward<false>, call.grid(int64_t(p.a.B) * p.a.Hq), kHeadThreads, kHeadShared, p);
    }
    if (call.needs_mask) run_mask<T>(call);
  }
  if (p.dsinks) call.device.launch(&attention_head_backward<true>, call.grid(p.a.Hq), kHeadThreads, kHeadShared, p);
  p.sums = kNoSums;
  p.parts = 1;
  run_keys<T, D, OPTIONS, SMALL>(call);
  run_rows<T, D, OPTIONS, SMALL>(call);
}

template <class T, int D> void run_size(BackwardCall& call) {
  const AttentionParams& a = call.p.a;
  const bool options = a.mask_kind != kNoMask || a.slopes || a.softcap > 0 || a.dropout;
  const bool small = D >= 64 && call.device.shared_bytes < kSmallShared;
  const auto run = [&](auto with_options) {
    if (!small) run_all<T, D, decltype(with_options)::value, false>(call);
    else if constexpr (kAllKernels && !std::is_same_v<T, tf32>) run_all<T, D, decltype(with_options)::value, D >= 64>(call);
    else STD_TORCH_CHECK(false, "fastlm::", call.op, ": this build has no kernels for a GPU of so little shared memory");
  };
  if constexpr (sizeof(T) == 2) {  // float32's products leave time for options
    if (!options) return run(std::false_type{});
  }
  run(std::true_type{});
}

// All gradients of a call that is not empty.
template <class T> void run_backward(BackwardCall& call) {
  with_head_size(std::max(call.p.a.D, call.p.a.Dv), call.op,
                 [&](auto size) { run_size<T, decltype(size)::value>(call); });
}
extern template void run_backward<float>(BackwardCall&);
extern template void run_backward<tf32>(BackwardCall&);
extern template void run_backward<bf16>(BackwardCall&);
extern template void run_backward<f16>(BackwardCall&);

}  // namespace fastlm::cuda
