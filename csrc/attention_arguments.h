// Arguments of the attention operators in all kernel families: their checks, and what of masks and dropout is the
// same in the parameters of each.
#pragma once
#include <algorithm>

#include "check.h"
#include "cpu/attention.h"

namespace fastlm {

using OptionalTensor = std::optional<Tensor>;

// Options of the dense operators, in the order of their schemas.
struct DenseOptions {
  bool is_causal;
  double scale;
  const OptionalTensor &attn_mask, &alibi_slopes, &sinks, &seed;
  double dropout_p;
  int64_t window_left, window_right;
  double softcap;
};

// Packed sequences: (T, H, D), or pages of keys and values.
struct PackedOptions {
  const Tensor& cu_seq_q;
  const OptionalTensor &cu_seq_k, &seqused_k, &block_table;
  int64_t max_q, max_k, window_left, window_right;
  double scale;
};

inline void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t Hq, int64_t Hkv, const char* op) {
  check_same_dtype(k, q, op, "key");
  check_same_dtype(v, q, op, "value");
  STD_TORCH_CHECK(Hkv == Hq || (Hkv > 0 && Hq % Hkv == 0), "fastlm::", op, ": ", Hq,
                  " query heads cannot share ", Hkv, " key heads");
}

inline void check_dense(const Tensor& q, const Tensor& k, const Tensor& v, const char* op) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "fastlm::", op,
                  ": query, key and value must be (B, H, T, D), got ", shape_string(q), ", ", shape_string(k),
                  " and ", shape_string(v));
  const int64_t B = q.size(0), Hkv = k.size(1), Tk = k.size(2);
  check_shape(k, {B, Hkv, Tk, q.size(3)}, op, "key");
  check_shape(v, {B, Hkv, Tk, v.size(3)}, op, "value");
  check_heads(q, k, v, q.size(1), Hkv, op);
}

inline void check_packed(const Tensor& q, const Tensor& k, const Tensor& v, const PackedOptions& o, const char* op) {
  const bool paged = o.block_table.has_value();
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == (paged ? 4 : 3) && v.dim() == k.dim(), "fastlm::", op,
                  ": query must be (T, H, D), key and value (T, H, D) or pages (P, S, H, D), got ", shape_string(q),
                  ", ", shape_string(k), " and ", shape_string(v));
  const int64_t N = o.cu_seq_q.numel() - 1, Hkv = k.size(-2), D = q.size(2), Dv = v.size(-1);
  STD_TORCH_CHECK(N >= 0, "fastlm::", op, ": cu_seq_q is empty");
  if (paged) {
    const Tensor& table = *o.block_table;
    check_shape(k, {k.size(0), k.size(1), Hkv, D}, op, "key");
    check_shape(v, {k.size(0), k.size(1), Hkv, Dv}, op, "value");
    STD_TORCH_CHECK(o.seqused_k, "fastlm::", op, ": block_table needs seqused_k");
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == N, "fastlm::", op, ": block_table has shape ",
                    shape_string(table), ", expected (", N, ", pages)");
    check_dtype(table, ScalarType::Int, op, "block_table");
  } else {
    check_shape(k, {k.size(0), Hkv, D}, op, "key");
    check_shape(v, {k.size(0), Hkv, Dv}, op, "value");
    STD_TORCH_CHECK(o.cu_seq_k, "fastlm::", op, ": cu_seq_k is needed without block_table");
  }
  check_heads(q, k, v, q.size(1), Hkv, op);
}

// What a forward gave for q, (B, Hq, Tq, D) or (T, Hq, D), and the gradients of it.
inline void check_outputs(const Tensor& q, int64_t Dv, const Tensor& dout, const OptionalTensor& dlse,
                          const Tensor& out, const Tensor& lse, const char* op) {
  const ScalarType wide = compute_type(q.scalar_type());
  for (const Tensor* t : {&dout, &out}) {
    const char* const name = t == &out ? "out" : "dout";
    check_same_dtype(*t, q, op, name);
    if (q.dim() == 4) check_shape(*t, {q.size(0), q.size(1), q.size(2), Dv}, op, name);
    else check_shape(*t, {q.size(0), q.size(1), Dv}, op, name);
  }
  check_dtype(lse, wide, op, "lse");
  if (q.dim() == 4) check_shape(lse, {q.size(0), q.size(1), q.size(2)}, op, "lse");
  else check_shape(lse, {q.size(1), q.size(0)}, op, "lse");
  if (!dlse) return;
  check_dtype(*dlse, wide, op, "dlse");
  STD_TORCH_CHECK(dlse->numel() == lse.numel(), "fastlm::", op, ": dlse has shape ", shape_string(*dlse));
}

// Kind and strides (0 where it broadcasts) of a mask over scores of the size `full`, (B, Hq, Tq, Tk).
template <class Params>
void set_mask(Params& p, const Tensor& m, ScalarType dtype, const int64_t (&full)[4], const char* op) {
  int64_t* const strides[4] = {&p.mask_b, &p.mask_h, &p.mask_q, &p.mask_k};
  STD_TORCH_CHECK(m.dim() == 4, "fastlm::", op, ": attn_mask must have 4 dimensions");
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(m.size(d) == full[d] || m.size(d) == 1, "fastlm::", op, ": attn_mask has shape ",
                    shape_string(m), ", which does not broadcast to the scores");
    *strides[d] = m.size(d) == 1 ? 0 : m.stride(d);
  }
  if (m.scalar_type() == ScalarType::Bool) {
    p.mask_kind = kBoolMask;
  } else if (m.scalar_type() == dtype) {
    p.mask_kind = kSameMask;
  } else {
    check_dtype(m, ScalarType::Float, op, "attn_mask");
    p.mask_kind = kFloatMask;
  }
  p.mask = m.const_data_ptr();
}

template <class Params> void set_dropout(Params& p, const DenseOptions& o, const char* op) {
  STD_TORCH_CHECK(o.dropout_p >= 0 && o.dropout_p <= 1, "fastlm::", op, ": dropout_p is ", o.dropout_p,
                  ", expected a probability");
  p.keep_scale = 1;
  if (o.dropout_p == 0) return;
  STD_TORCH_CHECK(o.seed && o.seed->numel() == 1 && o.seed->is_cpu(), "fastlm::", op,
                  ": dropout needs a seed on the CPU");
  check_dtype(*o.seed, ScalarType::Long, op, "seed");
  p.dropout = true;
  p.seed = uint64_t(*static_cast<const int64_t*>(o.seed->const_data_ptr()));
  p.drop_below = uint32_t(std::min(o.dropout_p * 4294967296.0, 4294967295.0));
  p.keep_scale = o.dropout_p < 1 ? decltype(p.keep_scale)(1 / (1 - o.dropout_p)) : 0;
}

}  // namespace fastlm
