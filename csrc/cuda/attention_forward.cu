// Attention's forward on a GPU: division of the work, launches, registration.
//
// How work is divided follows from shapes and the device alone: it decides the order of sums.
#include "attention_forward_warpgroups.cuh"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "attention_call.h"

namespace fastlm::cuda {
namespace {

constexpr int64_t kFewRows = 64;     // of a key head, up to which its keys are split
constexpr int64_t kMostSplits = 128;

// Splits of the keys: as many as multiprocessors with two blocks each run at once, for a few more blocks take a second
// turn (8 x 12 heads of 4096 keys on an H100: two splits 50 us, three 60). Those of packed sequences don't depend on
// their number, nor do results.
void divide_keys(const AttentionCall& c, ForwardParams& p, int multiprocessors) {
  const int64_t heads = int64_t(p.a.Hkv) * (c.packed ? 1 : p.a.B);
  p.most_splits = int(std::clamp<int64_t>(2 * multiprocessors / heads, 1, kMostSplits));
  p.splits = int(std::clamp<int64_t>(ceil_div(p.a.Tk, kSplitKeys), 1, p.most_splits));
}

// Warps of rows, of keys, and stages: where there is a choice, as many as leave shared memory for two blocks.
template <class T, int kD, bool OPTIONS> size_t divide_block(ForwardParams& p, size_t shared_bytes) {
  using Shape = ForwardShape<T, kD, OPTIONS>;
  const auto bytes = [&](int key_warps, int stages) {
    return forward_shared_bytes<T, kD, OPTIONS>(p.row_warps, key_warps, stages);
  };
  p.row_warps = 1;
  while (p.row_warps < Shape::kWarps && 16 * Shape::kTiles * p.row_warps < p.rows_most) p.row_warps *= 2;
  p.key_warps = Shape::kWarps / p.row_warps;
  while (p.key_warps > 1 && bytes(p.key_warps, 2) > shared_bytes / 2) p.key_warps /= 2;
  p.stages = 3;
  while (p.stages > 1 && bytes(p.key_warps, p.stages) > shared_bytes / 2) --p.stages;
  if (bytes(p.key_warps, p.stages) > shared_bytes / 2)
    for (p.stages = 3; p.stages > 1 && bytes(p.key_warps, p.stages) > shared_bytes;) --p.stages;
  p.blocks = int(ceil_div(p.rows_most, 16 * Shape::kTiles * p.row_warps));
  return bytes(p.key_warps, p.stages);
}

dim3 grid_of(const AttentionCall& c, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "fastlm::", c.op, ": ", blocks, " blocks, more than a grid has");
  return dim3(unsigned(blocks));
}

template <class T, int kD, bool OPTIONS> void launch(const AttentionCall& c, ForwardParams& p, Device& device) {
  const int64_t heads = int64_t(p.a.B) * p.a.Hkv;
  const size_t shared = divide_block<T, kD, OPTIONS>(p, device.shared_bytes);
  p.together = heads_together(p.a, p.a.Tk, sizeof(T));
  device.launch(&attention_forward<T, kD, OPTIONS>, grid_of(c, heads * p.splits * p.blocks),
                32 * ForwardShape<T, kD, OPTIONS>::kWarps, shared, p);
  if (p.splits > 1)
    device.launch(&attention_combine<stored_t<T>>, grid_of(c, heads * p.rows_most), 32 * kCombineWarps, kCombineBytes, p);
}

// Columns of the kernel for heads of kD, 0: there is none. Builds of some kernels have it for their small heads.
template <class T> constexpr int warpgroup_columns(int kD) {
#ifdef FASTLM_SOME_KERNELS
  if (kD < 64) kD = 64;
#endif
  return sizeof(T) == 2 && (kD == 64 || kD == 128) ? kD : 0;
}

// Whether it is launched: where the device, and the code for it, have the products of warpgroups.
template <class T, int kD> bool launch_warpgroups(const AttentionCall& c, ForwardParams& p, Device& device) {
  using Shape = WarpgroupShape<kD>;
  const auto kernel = &attention_forward_warpgroups<T, kD>;
  if (!device.runs(kernel, Shape::kThreads)) return false;
  p.blocks = int(ceil_div(p.rows_most, Shape::kRows));
  p.together = heads_together(p.a, p.a.Tk, sizeof(T));
  device.launch(kernel, grid_of(c, int64_t(p.a.B) * p.a.Hkv * p.blocks), Shape::kThreads,
                Shape::kSharedBytes, p);
  return true;
}

// Fills out, of whole rows, and lse.
void run_forward(AttentionCall& c, const Tensor& q, const Tensor& out, const Tensor& lse, bool split_keys) {
  c.set_out(out, lse);
  ForwardParams p{};
  p.a = c.p;
  p.rows_most = int64_t(c.p.Tq) * c.p.group;
  if (p.rows_most == 0 || c.p.B == 0 || c.p.Hq == 0) return;
  Device device(q, c.op);
  p.splits = 1;
  if (split_keys && p.rows_most <= kFewRows) divide_keys(c, p, device.multiprocessors);
  const int64_t heads = int64_t(c.p.B) * c.p.Hkv;
  if (p.splits > 1) {
    const int64_t rows = heads * p.splits * p.rows_most;
    p.part_out = static_cast<float*>(c.hold_mutable(new_like(q, {rows, c.p.Dv}, ScalarType::Float)));
    p.part_lse = static_cast<float*>(c.hold_mutable(new_like(q, {rows}, ScalarType::Float)));
  }
  const bool options = c.p.mask_kind != kNoMask || c.p.slopes || c.p.softcap > 0 || c.p.dropout || !(c.p.scale > 0);
  with_instance(c, device, [&](auto t, auto size) {
    using T = decltype(t);
    constexpr int kD = decltype(size)::value;
    if constexpr (constexpr int kColumns = warpgroup_columns<T>(kD); kColumns > 0)
      if (!options && p.rows_most > kFewRows && launch_warpgroups<T, kColumns>(c, p, device)) return;
    if constexpr (sizeof(T) == 2)
      if (!options) return launch<T, kD, false>(c, p, device);
    launch<T, kD, true>(c, p, device);
  });
}

std::tuple<Tensor, Tensor> attention_forward_dense(
    const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal, double scale,
    const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& seed, double dropout_p, int64_t window_left, int64_t window_right, double softcap) {
  AttentionCall c = dense_call("attention_forward", query, key, value,
                               {is_causal, scale, attn_mask, alibi_slopes, sinks, seed, dropout_p, window_left,
                                window_right, softcap});
  const Tensor out = empty_as(query, c.Dv), rows = rows_for(out);
  const Tensor lse = new_like(query, {c.p.B, c.p.Hq, c.p.Tq}, ScalarType::Float);
  run_forward(c, query, rows, lse, true);
  give_rows(rows, out);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_forward_packed(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seq_q,
    const OptionalTensor& cu_seq_k, const OptionalTensor& seqused_k, const OptionalTensor& block_table, int64_t max_q,
    int64_t max_k, int64_t window_left, int64_t window_right, double scale, int64_t num_splits) {
  AttentionCall c = packed_call("varlen_attention_forward", query, key, value,
                                {cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, window_left, window_right,
                                 scale});
  const Tensor out = new_like(query, {query.size(0), c.p.Hq, c.Dv}, query.scalar_type());
  Tensor rows = rows_for(out), lse = new_like(query, {c.p.Hq, query.size(0)}, ScalarType::Float);
  torch::stable::zero_(rows);  // rows may be of no sequence
  torch::stable::fill_(lse, -INFINITY);
  run_forward(c, query, rows, lse, num_splits != 1);
  give_rows(rows, out);
  return {out, lse};
}

FASTLM_OPERATORS(m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward_dense));
  m.impl("varlen_attention_forward", TORCH_BOX(&attention_forward_packed));
}

}  // namespace
}  // namespace fastlm::cuda
