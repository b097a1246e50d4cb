// Attention's operators on a GPU, the host's part that forward and backward share: checks, tensors to
// AttentionParams, and the choice of an instance.
//
// Offsets, lengths and tables of packed sequences are trusted: to read them, the host would wait for the
// device.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../attention_arguments.h"
#include "attention.cuh"
#include "launch.h"
#include "tensors.h"

namespace fastlm::cuda {
namespace {

inline constexpr int64_t kMostRows = int64_t(1) << 29;  // of a key head, and keys: sums of two stay ints

// ---- tensors -------------------------------------------------------------------------------

// An uninitialised (B, H, T, D), its memory ordered as `like`'s.
inline Tensor empty_as(const Tensor& like, int64_t D) {
  const int64_t B = like.size(0), H = like.size(1), T = like.size(2);
  if (like.stride(1) < like.stride(2))
    return torch::stable::transpose(new_like(like, {B, T, H, D}, like.scalar_type()), 1, 2);
  return new_like(like, {B, H, T, D}, like.scalar_type());
}

// Strides of a (B, H, T, D), of a packed (T, H, D), or of pages (P, S, H, D).
enum Layout { kDense, kPacked, kPaged };
inline HeadStrides strides_of(const Tensor& t, Layout layout) {
  if (layout == kDense) return {t.stride(0), t.stride(1), t.stride(2)};
  if (layout == kPacked) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(2), t.stride(1)};
}

// ---- arguments -----------------------------------------------------------------------------

// Parameters of a call without its results, and what keeps their memory alive.
struct AttentionCall {
  const char* op = "";
  AttentionParams p{};
  ScalarType dtype{};
  int64_t D = 0, Dv = 0;  // head sizes of the tensors given; those in p are padded
  bool packed = false;
  std::vector<Tensor> held;

  const void* hold(const Tensor& t) {
    held.push_back(t);
    return t.const_data_ptr();
  }
  void* hold_mutable(const Tensor& t) {
    held.push_back(t);
    return t.mutable_data_ptr();
  }
  // p.out, p.lse and their strides. out: of whole rows; lse: contiguous (B, H, T) or (H, T).
  void set_out(const Tensor& out, const Tensor& lse) {
    p.out = hold_mutable(out);
    p.os = strides_of(out, packed ? kPacked : kDense);
    p.lse = static_cast<float*>(hold_mutable(lse));
    p.lse_b = packed ? 0 : lse.stride(0);
    p.lse_h = lse.stride(packed ? 0 : 1);
  }
};

inline int small(int64_t n, const char* op, const char* what) {
  STD_TORCH_CHECK(n <= kMostRows, "fastlm::", op, ": ", n, " ", what, ", expected at most ", kMostRows);
  return int(n);
}

inline void check_same_device(const Tensor& t, const Tensor& q, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == q.is_cuda() && t.get_device_index() == q.get_device_index(), "fastlm::", op, ": ",
                  name, " is on another device than query");
}

// Query, key and value of either layout: dtypes, heads, sizes and data.
inline void set_tensors(AttentionCall& c, const Tensor& q, const Tensor& k, const Tensor& v, Layout keys) {
  AttentionParams& p = c.p;
  const int64_t Hq = q.size(1), Hkv = k.size(keys == kDense ? 1 : -2);
  c.dtype = q.scalar_type();
  STD_TORCH_CHECK(c.dtype == ScalarType::Float || c.dtype == ScalarType::BFloat16 || c.dtype == ScalarType::Half,
                  "fastlm::", c.op, ": query must be float32, bfloat16 or float16");
  check_same_device(k, q, c.op, "key");
  check_same_device(v, q, c.op, "value");
  c.D = q.size(-1);
  c.Dv = v.size(-1);
  STD_TORCH_CHECK(c.D <= 256 && c.Dv <= 256, "fastlm::", c.op, ": head sizes ", c.D, " and ", c.Dv,
                  ", expected at most 256");
  p.Hq = small(Hq, c.op, "query heads");
  p.Hkv = int(Hkv);
  p.group = Hkv ? int(Hq / Hkv) : 1;
  p.D = int(padded_size(q, c.D));
  p.Dv = int(padded_size(v, c.Dv));
  const Tensor rows[3] = {whole_rows(q), whole_rows(k), whole_rows(v)};
  p.q = c.hold(rows[0]);
  p.k = c.hold(rows[1]);
  p.v = c.hold(rows[2]);
  p.qs = strides_of(rows[0], keys == kDense ? kDense : kPacked);
  p.ks = strides_of(rows[1], keys);
  p.vs = strides_of(rows[2], keys);
}

inline void set_window(AttentionParams& p, bool is_causal, int64_t left, int64_t right) {
  p.causal = is_causal;
  p.left = int(std::clamp<int64_t>(left, -1, kUnbounded));
  p.right = int(std::clamp<int64_t>(right, -1, kUnbounded));
}

inline const float* float_values(AttentionCall& c, const Tensor& t, const Tensor& q, const char* name) {
  check_dtype(t, ScalarType::Float, c.op, name);
  check_same_device(t, q, c.op, name);
  return static_cast<const float*>(c.hold(fastlm::contiguous(t)));
}

inline AttentionCall dense_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                const DenseOptions& o) {
  AttentionCall c;
  c.op = op;
  AttentionParams& p = c.p;
  check_dense(q, k, v, op);
  set_tensors(c, q, k, v, kDense);
  p.B = small(q.size(0), op, "batch entries");
  p.Tq = small(q.size(2), op, "queries");
  p.Tk = small(k.size(2), op, "keys");
  small(int64_t(p.Tq) * p.group, op, "queries of a key head");
  set_window(p, o.is_causal, o.window_left, o.window_right);
  p.scale = float(o.scale);
  p.softcap = float(o.softcap);
  if (o.attn_mask) {
    check_same_device(*o.attn_mask, q, op, "attn_mask");
    set_mask(p, *o.attn_mask, c.dtype, {p.B, p.Hq, p.Tq, p.Tk}, op);
  }
  if (o.alibi_slopes) {
    check_shape(*o.alibi_slopes, {p.B, p.Hq}, op, "alibi_slopes");
    p.slopes = float_values(c, *o.alibi_slopes, q, "alibi_slopes");
  }
  if (o.sinks) {
    check_shape(*o.sinks, {p.Hq}, op, "sinks");
    p.sinks = float_values(c, *o.sinks, q, "sinks");
  }
  set_dropout(p, o, op);
  return c;
}

inline const int32_t* int32_values(AttentionCall& c, const Tensor& t, int64_t n, const Tensor& q, const char* name) {
  check_dtype(t, ScalarType::Int, c.op, name);
  check_shape(t, {n}, c.op, name);
  check_same_device(t, q, c.op, name);
  return static_cast<const int32_t*>(c.hold(fastlm::contiguous(t)));
}

inline AttentionCall packed_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const PackedOptions& o) {
  AttentionCall c;
  c.op = op;
  c.packed = true;
  AttentionParams& p = c.p;
  const bool paged = o.block_table.has_value();
  const int64_t N = o.cu_seq_q.numel() - 1;
  check_packed(q, k, v, o, op);
  set_tensors(c, q, k, v, paged ? kPaged : kPacked);
  p.B = small(N, op, "sequences");
  p.cu_q = int32_values(c, o.cu_seq_q, N + 1, q, "cu_seq_q");
  if (o.cu_seq_k && !paged) p.cu_k = int32_values(c, *o.cu_seq_k, N + 1, q, "cu_seq_k");
  if (o.seqused_k) p.used = int32_values(c, *o.seqused_k, N, q, "seqused_k");
  int64_t room = k.size(0);
  if (paged) {
    const Tensor table = fastlm::contiguous(*o.block_table);
    check_same_device(table, q, op, "block_table");
    p.table = static_cast<const int32_t*>(c.hold(table));
    p.table_b = small(table.size(1), op, "pages of a sequence");
    p.page_size = small(k.size(1), op, "keys of a page");
    room = table.size(1) * k.size(1);
  }
  p.Tq = small(std::min(o.max_q, q.size(0)), op, "queries");
  p.Tk = small(p.used ? room : std::min(o.max_k, room), op, "keys");
  small(q.size(0) * p.group, op, "queries of a key head");
  set_window(p, false, o.window_left, o.window_right);
  p.scale = float(o.scale);
  p.keep_scale = 1;
  return c;
}

// ---- instances -----------------------------------------------------------------------------

// Calls f(T{}, std::integral_constant<int, S>{}) for the call's dtype and head size.
template <class F> void with_instance(const AttentionCall& c, const Device& device, const F& f) {
  with_head_size(std::max(c.p.D, c.p.Dv), c.op, [&](auto size) {
    if constexpr (kAllKernels) {
      if (c.dtype == ScalarType::Float && device.uses_tf32()) return f(tf32{}, size);
    }
    if (c.dtype == ScalarType::Float) f(float{}, size);
    else if (c.dtype == ScalarType::BFloat16) f(bf16{}, size);
    else if constexpr (kAllKernels) f(f16{}, size);
    else STD_TORCH_CHECK(false, "fastlm::", c.op, ": this build has no float16");
  });
}

}  // namespace
}  // namespace fastlm::cuda
