// Attention's operators on a GPU, the host's part that forward and backward share: checks, tensors to
// AttentionParams, and the choice of an instance.
//
// Offsets, lengths and tables of packed sequences are trusted: to read them, the host would wait for the
// device.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

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
  check_dtype(k, c.dtype, c.op, "key");
  check_dtype(v, c.dtype, c.op, "value");
  check_same_device(k, q, c.op, "key");
  check_same_device(v, q, c.op, "value");
  STD_TORCH_CHECK(Hkv == Hq || (Hkv > 0 && Hq % Hkv == 0), "fastlm::", c.op, ": ", Hq,
                  " query heads cannot share ", Hkv, " key heads");
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

// Options of the dense operators, in the order of their schemas.
struct DenseOptions {
  const OptionalTensor &attn_mask, &alibi_slopes, &sinks, &seed;
  double dropout_p;
  bool is_causal;
  int64_t window_left, window_right;
  double scale, softcap;
};

inline void set_mask(AttentionCall& c, const Tensor& m, const Tensor& q) {
  AttentionParams& p = c.p;
  const int64_t full[4] = {p.B, p.Hq, p.Tq, p.Tk};
  int64_t* const strides[4] = {&p.mask_b, &p.mask_h, &p.mask_q, &p.mask_k};
  STD_TORCH_CHECK(m.dim() == 4, "fastlm::", c.op, ": attn_mask must have 4 dimensions");
  check_same_device(m, q, c.op, "attn_mask");
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(m.size(d) == full[d] || m.size(d) == 1, "fastlm::", c.op, ": attn_mask has shape ",
                    shape_string(m), ", which does not broadcast to the scores");
    *strides[d] = m.size(d) == 1 ? 0 : m.stride(d);
  }
  if (m.scalar_type() == ScalarType::Bool) {
    p.mask_kind = kBoolMask;
  } else if (m.scalar_type() == c.dtype) {
    p.mask_kind = kSameMask;
  } else {
    check_dtype(m, ScalarType::Float, c.op, "attn_mask");
    p.mask_kind = kFloatMask;
  }
  p.mask = c.hold(m);
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
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "fastlm::", op,
                  ": query, key and value must be (B, H, T, D), got ", shape_string(q), ", ", shape_string(k),
                  " and ", shape_string(v));
  const int64_t B = q.size(0), Tk = k.size(2);
  check_shape(k, {B, k.size(1), Tk, q.size(3)}, op, "key");
  check_shape(v, {B, k.size(1), Tk, v.size(3)}, op, "value");
  set_tensors(c, q, k, v, kDense);
  p.B = small(B, op, "batch entries");
  p.Tq = small(q.size(2), op, "queries");
  p.Tk = small(Tk, op, "keys");
  small(int64_t(p.Tq) * p.group, op, "queries of a key head");
  set_window(p, o.is_causal, o.window_left, o.window_right);
  p.scale = float(o.scale);
  p.softcap = float(o.softcap);
  if (o.attn_mask) set_mask(c, *o.attn_mask, q);
  if (o.alibi_slopes) {
    check_shape(*o.alibi_slopes, {B, p.Hq}, op, "alibi_slopes");
    p.slopes = float_values(c, *o.alibi_slopes, q, "alibi_slopes");
  }
  if (o.sinks) {
    check_shape(*o.sinks, {p.Hq}, op, "sinks");
    p.sinks = float_values(c, *o.sinks, q, "sinks");
  }
  STD_TORCH_CHECK(o.dropout_p >= 0 && o.dropout_p <= 1, "fastlm::", op, ": dropout_p is ", o.dropout_p,
                  ", expected a probability");
  p.keep_scale = 1;
  if (o.dropout_p > 0) {
    STD_TORCH_CHECK(o.seed && o.seed->numel() == 1 && o.seed->is_cpu(), "fastlm::", op,
                    ": dropout needs a seed on the CPU");
    check_dtype(*o.seed, ScalarType::Long, op, "seed");
    p.dropout = true;
    p.seed = uint64_t(*static_cast<const int64_t*>(o.seed->const_data_ptr()));
    p.drop_below = uint32_t(std::min(o.dropout_p * 4294967296.0, 4294967295.0));
    p.keep_scale = o.dropout_p < 1 ? float(1 / (1 - o.dropout_p)) : 0;
  }
  return c;
}

// Packed sequences: (T, H, D), or pages of keys and values.
struct PackedOptions {
  const Tensor& cu_seq_q;
  const OptionalTensor &cu_seq_k, &seqused_k, &block_table;
  int64_t max_q, max_k, window_left, window_right;
  double scale;
};

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
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == (paged ? 4 : 3) && v.dim() == k.dim(), "fastlm::", op,
                  ": query must be (T, H, D), key and value (T, H, D) or pages (P, S, H, D), got ", shape_string(q),
                  ", ", shape_string(k), " and ", shape_string(v));
  const int64_t N = o.cu_seq_q.numel() - 1, Hkv = k.size(-2), D = q.size(2), Dv = v.size(-1);
  STD_TORCH_CHECK(N >= 0, "fastlm::", op, ": cu_seq_q is empty");
  if (paged) {
    check_shape(k, {k.size(0), k.size(1), Hkv, D}, op, "key");
    check_shape(v, {k.size(0), k.size(1), Hkv, Dv}, op, "value");
  } else {
    check_shape(k, {k.size(0), Hkv, D}, op, "key");
    check_shape(v, {k.size(0), Hkv, Dv}, op, "value");
  }
  set_tensors(c, q, k, v, paged ? kPaged : kPacked);
  p.B = small(N, op, "sequences");
  p.cu_q = int32_values(c, o.cu_seq_q, N + 1, q, "cu_seq_q");
  if (o.cu_seq_k && !paged) p.cu_k = int32_values(c, *o.cu_seq_k, N + 1, q, "cu_seq_k");
  if (o.seqused_k) p.used = int32_values(c, *o.seqused_k, N, q, "seqused_k");
  int64_t room = k.size(0);
  if (paged) {
    const Tensor table = fastlm::contiguous(*o.block_table);
    STD_TORCH_CHECK(p.used, "fastlm::", op, ": block_table needs seqused_k");
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == N, "fastlm::", op, ": block_table has shape ",
                    shape_string(table), ", expected (", N, ", pages)");
    check_dtype(table, ScalarType::Int, op, "block_table");
    check_same_device(table, q, op, "block_table");
    p.table = static_cast<const int32_t*>(c.hold(table));
    p.table_b = small(table.size(1), op, "pages of a sequence");
    p.page_size = small(k.size(1), op, "keys of a page");
    room = table.size(1) * k.size(1);
  } else {
    STD_TORCH_CHECK(p.cu_k, "fastlm::", op, ": cu_seq_k is needed without block_table");
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
