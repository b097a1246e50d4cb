// Attention's backward on a GPU: checks, memory, registration.
#include "attention_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "attention_call.h"

namespace fastlm::cuda {
namespace {

// Of the operators' gradients, in their order, and what the kernels write for them: rows of whole chunks.
struct Gradients {
  Tensor dq, dk, dv, dq_rows, dk_rows, dv_rows;
  Gradients(const Tensor& q, const Tensor& k, const Tensor& v)
      : dq(q), dk(k), dv(v), dq_rows(rows_for(dq)), dk_rows(rows_for(dk)), dv_rows(rows_for(dv)) {}

  void zero() {
    for (Tensor* t : {&dq_rows, &dk_rows, &dv_rows}) torch::stable::zero_(*t);
  }
  void give() const {
    give_rows(dq_rows, dq);
    give_rows(dk_rows, dk);
    give_rows(dv_rows, dv);
  }
};

// Parameters of what both operators have.
void set_params(AttentionCall& c, BackwardCall& call, const Gradients& g, const Tensor& query, const Tensor& out, const Tensor& lse,
                const Tensor& dout, const OptionalTensor& dlse) {
  AttentionBackwardParams& p = call.p;
  const Layout layout = c.packed ? kPacked : kDense;
  check_same_device(out, query, c.op, "out");
  check_same_device(dout, query, c.op, "dout");
  check_same_device(lse, query, c.op, "lse");
  const Tensor dout_rows = whole_rows(dout);
  c.set_out(whole_rows(out), fastlm::contiguous(lse));
  p.a = c.p;
  p.dout = c.hold(dout_rows);
  p.dos = strides_of(dout_rows, layout);
  if (dlse) p.dlse = float_values(c, *dlse, query, "dlse");
  p.dq = c.hold_mutable(g.dq_rows);
  p.dk = c.hold_mutable(g.dk_rows);
  p.dv = c.hold_mutable(g.dv_rows);
  p.dqs = strides_of(g.dq_rows, layout);
  p.dks = strides_of(g.dk_rows, layout);
  p.dvs = strides_of(g.dv_rows, layout);
  p.dk_size = g.dk_rows.numel();
  p.dv_size = g.dv_rows.numel();
  const int64_t rows = c.packed ? query.size(0) * p.a.group / 16 + p.a.B : blocks_of(int64_t(p.a.Tq) * p.a.group, 16);
  p.stats_h = rows * 16;
  p.stats_b = c.packed ? 0 : p.a.Hkv * p.stats_h;
  const int64_t all = (c.packed ? 1 : p.a.B) * p.a.Hkv * p.stats_h;
  p.stats = reinterpret_cast<RowStats*>(call.floats(2 * all));
}

void run(ScalarType dtype, BackwardCall& call) {
  if (kAllKernels && dtype == ScalarType::Float && call.device.uses_tf32()) run_backward<tf32>(call);
  else if (dtype == ScalarType::Float) run_backward<float>(call);
  else if (dtype == ScalarType::BFloat16) run_backward<bf16>(call);
  else if (kAllKernels) run_backward<f16>(call);
  else STD_TORCH_CHECK(false, "fastlm::", call.op, ": this build has no float16");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_dense(
    const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, bool is_causal, double scale, const OptionalTensor& dlse, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& seed, double dropout_p,
    int64_t window_left, int64_t window_right, double softcap, bool needs_mask, bool needs_slopes) {
  const char* const op = "attention_backward";
  AttentionCall c = dense_call(op, query, key, value,
                               {is_causal, scale, attn_mask, alibi_slopes, sinks, seed, dropout_p, window_left,
                                window_right, softcap});
  check_outputs(query, c.Dv, dout, dlse, out, lse, op);
  STD_TORCH_CHECK(!needs_mask || attn_mask, "fastlm::", op, ": needs_mask without attn_mask");
  STD_TORCH_CHECK(!needs_slopes || alibi_slopes, "fastlm::", op, ": needs_slopes without alibi_slopes");
  Gradients g(empty_as(query, c.D), empty_as(key, c.D), empty_as(value, c.Dv));
  Tensor dmask, dslopes, dsinks;  // None where nobody asks for them
  if (needs_mask) dmask = new_tensor(attn_mask->sizes(), ScalarType::Float, &query);
  if (needs_slopes) dslopes = new_like(query, {c.p.B, c.p.Hq}, ScalarType::Float);
  if (sinks) dsinks = new_like(query, {c.p.Hq}, ScalarType::Float);
  if (c.p.B == 0 || c.p.Hq == 0 || c.p.Tq == 0 || c.p.Tk == 0) {
    g.zero();
    g.give();
    for (Tensor* t : {&dmask, &dslopes, &dsinks})
      if (t->defined()) torch::stable::zero_(*t);
    return {g.dq, g.dk, g.dv, dmask, dslopes, dsinks};
  }
  Device device(query, op);
  BackwardCall call{op, query, c.held, device, needs_mask, needs_slopes};
  set_params(c, call, g, query, out, lse, dout, dlse);
  if (needs_mask) {
    AttentionBackwardParams& p = call.p;
    p.mask_B = int(dmask.size(0));
    p.mask_H = int(dmask.size(1));
    p.mask_Tq = int(dmask.size(2));
    p.mask_Tk = int(dmask.size(3));
    p.dmask = static_cast<float*>(c.hold_mutable(dmask));
  }
  if (needs_slopes) call.p.dslopes = static_cast<float*>(c.hold_mutable(dslopes));
  if (sinks) call.p.dsinks = static_cast<float*>(c.hold_mutable(dsinks));
  run(c.dtype, call);
  g.give();
  return {g.dq, g.dk, g.dv, dmask, dslopes, dsinks};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_packed(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const Tensor& cu_seq_q, const Tensor& cu_seq_k, int64_t max_q, int64_t max_k,
    int64_t window_left, int64_t window_right, double scale) {
  const char* const op = "varlen_attention_backward";
  AttentionCall c = packed_call(op, query, key, value,
                                {cu_seq_q, cu_seq_k, std::nullopt, std::nullopt, max_q, max_k, window_left,
                                 window_right, scale});
  check_outputs(query, c.Dv, dout, dlse, out, lse, op);
  const auto like = [](const Tensor& t) { return new_like(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type()); };
  Gradients g(like(query), like(key), like(value));
  g.zero();  // rows and keys of no sequence
  if (c.p.B > 0 && c.p.Hq > 0 && c.p.Tq > 0 && c.p.Tk > 0) {
    Device device(query, op);
    BackwardCall call{op, query, c.held, device};
    set_params(c, call, g, query, out, lse, dout, dlse);
    run(c.dtype, call);
  }
  g.give();
  return {g.dq, g.dk, g.dv};
}

FASTLM_OPERATORS(m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward_dense));
  m.impl("varlen_attention_backward", TORCH_BOX(&attention_backward_packed));
}

}  // namespace
}  // namespace fastlm::cuda
