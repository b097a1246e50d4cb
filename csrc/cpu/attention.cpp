// Attention on the CPU: checks, tensors to parameters, division of the work, registration.
//
// How work is divided follows from shapes alone, never from the number of threads: it decides the order
// of sums, and results are the same bits on any number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../attention_arguments.h"
#include "dispatch.h"

namespace fastlm {
namespace {

constexpr double kSerialWork = 1 << 18;  // multiply-adds that one thread does before others wake up

Tensor rows_contiguous(const Tensor& t) { return t.stride(-1) == 1 ? t : torch::stable::contiguous(t); }

// An uninitialised (B, H, T, D), its memory ordered as `like`: (B, T, H, D) where heads are the inner
// of the two, so that the usual transposed views stay cheap to undo.
Tensor empty_as(const Tensor& like, int64_t D) {
  const int64_t B = like.size(0), H = like.size(1), T = like.size(2);
  if (like.stride(1) >= like.stride(2)) return new_tensor({B, H, T, D}, like.scalar_type());
  const int64_t size[4] = {B, H, T, D}, d = std::max<int64_t>(D, 1), h = d * std::max<int64_t>(H, 1);
  const int64_t strides[4] = {h * std::max<int64_t>(T, 1), d, h, 1};
  return new_strided(Ints(size, 4), Ints(strides, 4), like.scalar_type(), nullptr);
}

// Parameters, and what they point to.
struct Call {
  AttentionParams p{};
  DType dtype{};
  std::vector<AttentionSequence> sequences;
  std::vector<AttentionItem> items;
  std::vector<Tensor> held;
  double work = 0;  // multiply-adds of one product over all queries and keys

  ScalarType compute_type() const { return dtype == kF64 ? ScalarType::Double : ScalarType::Float; }

  const void* hold(const Tensor& t) {
    held.push_back(t);
    return t.const_data_ptr();
  }
  void* hold_mutable(const Tensor& t) {
    held.push_back(t);
    return t.mutable_data_ptr();
  }
};

void set_band(AttentionSequence& s, bool is_causal, int64_t left, int64_t right) {
  // Sums of 64 bits would wrap for the largest windows.
  s.lower = left >= 0 && left < kUnbounded ? left - (s.Tk - s.Tq) : kUnbounded;
  s.upper = right >= 0 && right < kUnbounded ? right + (s.Tk - s.Tq) : kUnbounded;
  if (is_causal) s.upper = std::min<int64_t>(s.upper, 0);
}

void set_tensors(Call& c, const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  AttentionParams& p = c.p;
  c.held.reserve(12);  // as many as most calls hold
  c.dtype = dtype_of(q, op, "query");
  p.q = c.hold(q);
  p.k = c.hold(k);
  p.v = c.hold(v);
  p.pool = torch_pool();
}

// The dense case: (B, H, T, D).
Call dense_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const DenseOptions& o) {
  Call c;
  AttentionParams& p = c.p;
  check_dense(q, k, v, op);
  set_tensors(c, op, q, k, v);
  const int64_t Tq = q.size(2), Tk = k.size(2);
  p.B = q.size(0);
  p.Hq = q.size(1);
  p.Hkv = k.size(1);
  p.D = q.size(3);
  p.Dv = v.size(3);
  p.qs = {q.stride(1), q.stride(2)};
  p.ks = {k.stride(1), k.stride(2)};
  p.vs = {v.stride(1), v.stride(2)};
  p.lse_h = Tq;
  p.scale = o.scale;
  p.softcap = o.softcap;
  if (o.attn_mask) {
    set_mask(p, *o.attn_mask, q.scalar_type(), {p.B, p.Hq, Tq, Tk}, op);
    int64_t* const sizes[4] = {&p.bias_b, &p.bias_h, &p.bias_q, &p.bias_k};
    for (int d = 0; d < 4; ++d) *sizes[d] = o.attn_mask->size(d);
  }
  const ScalarType wide = c.compute_type();
  if (o.alibi_slopes) {
    check_shape(*o.alibi_slopes, {p.B, p.Hq}, op, "alibi_slopes");
    check_dtype(*o.alibi_slopes, wide, op, "alibi_slopes");
    p.slopes = c.hold(fastlm::contiguous(*o.alibi_slopes));
  }
  if (o.sinks) {
    check_shape(*o.sinks, {p.Hq}, op, "sinks");
    check_dtype(*o.sinks, wide, op, "sinks");
    p.sinks = c.hold(fastlm::contiguous(*o.sinks));
  }
  set_dropout(p, o, op);
  c.sequences.resize(size_t(p.B));
  for (int64_t b = 0; b < p.B; ++b) {
    AttentionSequence& s = c.sequences[size_t(b)];
    s = {};
    s.Tq = Tq;
    s.Tk = Tk;
    set_band(s, o.is_causal, o.window_left, o.window_right);
    s.q = b * q.stride(0);
    s.k = b * k.stride(0);
    s.v = b * v.stride(0);
    s.lse = b * p.Hq * Tq;
  }
  c.work = double(p.B) * double(p.Hq) * double(Tq) * double(Tk) * double(p.D + p.Dv);
  return c;
}

const int32_t* int32_values(const Tensor& t, int64_t n, const char* op, const char* name) {
  check_dtype(t, ScalarType::Int, op, name);
  check_shape(t, {n}, op, name);
  STD_TORCH_CHECK(t.is_contiguous(), "fastlm::", op, ": ", name, " must be contiguous");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

void check_offsets(const int32_t* at, int64_t n, int64_t total, const char* op, const char* name) {
  STD_TORCH_CHECK(at[0] >= 0 && at[n] <= total, "fastlm::", op, ": ", name, " runs from ", at[0], " to ",
                  at[n], ", outside of the ", total, " rows");
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(at[i] <= at[i + 1], "fastlm::", op, ": ", name, " decreases from ", at[i], " to ",
                    at[i + 1], " at position ", i + 1);
}

Call packed_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const PackedOptions& o) {
  Call c;
  AttentionParams& p = c.p;
  const bool paged = o.block_table.has_value();
  check_packed(q, k, v, o, op);
  set_tensors(c, op, q, k, v);
  const int64_t kd = k.dim(), N = o.cu_seq_q.numel() - 1, total_q = q.size(0);
  p.B = N;
  p.Hq = q.size(1);
  p.Hkv = k.size(-2);
  p.D = q.size(2);
  p.Dv = v.size(-1);
  p.qs = {q.stride(1), q.stride(0)};
  p.ks = {k.stride(kd - 2), k.stride(kd - 3)};
  p.vs = {v.stride(kd - 2), v.stride(kd - 3)};
  p.lse_h = total_q;
  p.scale = o.scale;
  const int32_t* const q_at = int32_values(o.cu_seq_q, N + 1, op, "cu_seq_q");
  check_offsets(q_at, N, total_q, op, "cu_seq_q");
  const int32_t *k_at = nullptr, *used = nullptr, *table = nullptr;
  int64_t pages = 0, capacity = 0;
  if (o.cu_seq_k) {
    k_at = int32_values(*o.cu_seq_k, N + 1, op, "cu_seq_k");
    if (!paged) check_offsets(k_at, N, k.size(0), op, "cu_seq_k");
  }
  if (o.seqused_k) used = int32_values(*o.seqused_k, N, op, "seqused_k");
  if (paged) {
    const Tensor t = fastlm::contiguous(*o.block_table);
    table = static_cast<const int32_t*>(c.hold(t));
    pages = t.size(1);
    p.page_size = k.size(1);
    p.k_page = k.stride(0);
    p.v_page = v.stride(0);
    capacity = pages * p.page_size;
  }
  c.sequences.resize(size_t(N));
  for (int64_t n = 0; n < N; ++n) {
    AttentionSequence& s = c.sequences[size_t(n)];
    s = {};
    const int64_t room = paged ? capacity : k_at[n + 1] - k_at[n];
    s.Tq = q_at[n + 1] - q_at[n];
    s.Tk = used ? used[n] : room;
    STD_TORCH_CHECK(s.Tk >= 0 && s.Tk <= room, "fastlm::", op, ": seqused_k is ", s.Tk, " for sequence ", n,
                    ", which has room for ", room, " keys");
    STD_TORCH_CHECK(s.Tq <= o.max_q && (used || s.Tk <= o.max_k), "fastlm::", op, ": sequence ", n, " has ",
                    s.Tq, " queries and ", s.Tk, " keys, more than max_q = ", o.max_q,
                    " or max_k = ", o.max_k);
    set_band(s, false, o.window_left, o.window_right);
    s.q = q_at[n] * p.qs.t;
    if (paged) {
      s.pages = table + n * pages;
      for (int64_t j = 0; j * p.page_size < s.Tk; ++j)
        STD_TORCH_CHECK(s.pages[j] >= 0 && s.pages[j] < k.size(0), "fastlm::", op, ": block_table names page ",
                        s.pages[j], " of ", k.size(0), " for sequence ", n);
    } else {
      s.k = k_at[n] * p.ks.t;
      s.v = k_at[n] * p.vs.t;
    }
    s.lse = q_at[n];
    c.work += double(p.Hq) * double(s.Tq) * double(s.Tk) * double(p.D + p.Dv);
  }
  return c;
}

// Blocks of queries for the forward; few queries of a key head share one block, and their keys are
// split where there are many. Returns the rows of partial results.
int64_t divide_forward(Call& c, bool split_keys) {
  AttentionParams& p = c.p;
  const int64_t group = p.Hkv ? p.Hq / p.Hkv : 0;
  int64_t partial = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    AttentionSequence& s = c.sequences[size_t(b)];
    if (s.Tq == 0) continue;
    const int64_t rows = group * s.Tq;
    if (rows <= kRowBlock) {
      s.splits = split_keys ? std::clamp<int64_t>((s.Tk + 1023) / 1024, 1, 64) : 1;
      s.split_keys = (s.Tk / s.splits + kKeyBlock) / kKeyBlock * kKeyBlock;
      s.partial = partial;
      if (s.splits > 1) partial += p.Hkv * s.splits * rows;
      for (int64_t h = 0; h < p.Hkv; ++h)
        for (int64_t x = 0; x < s.splits; ++x)
          c.items.push_back({int32_t(b), int32_t(h), 0, rows, s.splits > 1 ? x : -1});
      continue;
    }
    // The last queries of a causal sequence see the most keys: these blocks go first.
    const int64_t blocks = (s.Tq + kRowBlock - 1) / kRowBlock;
    const int64_t size = ((s.Tq + blocks - 1) / blocks + 23) / 24 * 24;
    for (int64_t h = 0; h < p.Hkv; ++h)
      for (int64_t i = (s.Tq - 1) / size * size; i >= 0; i -= size)
        for (int64_t g = 0; g < group; ++g)
          c.items.push_back({int32_t(b), int32_t(h), g * s.Tq + i, std::min(size, s.Tq - i), -1});
  }
  return partial;
}

void finish(Call& c) {
  c.p.sequences = c.sequences.data();
  c.p.items = c.items.data();
  c.p.n_items = int64_t(c.items.size());
  if (c.work < kSerialWork) c.p.pool.threads = 1;
}

void run_forward(Call& c, const Tensor& out, const Tensor& lse, bool split_keys) {
  AttentionParams& p = c.p;
  p.out = c.hold_mutable(out);
  p.lse = c.hold_mutable(lse);
  const int64_t partial = divide_forward(c, split_keys);
  if (partial > 0) {
    p.partial_out = c.hold_mutable(new_tensor({partial, p.Dv}, lse.scalar_type()));
    p.partial_lse = c.hold_mutable(new_tensor({partial}, lse.scalar_type()));
  }
  finish(c);
  kernels().attention.forward[c.dtype](p);
}

std::tuple<Tensor, Tensor> dense_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const DenseOptions& options) {
  const Tensor q = rows_contiguous(query), k = rows_contiguous(key), v = rows_contiguous(value);
  Call c = dense_call("attention_forward", q, k, v, options);
  const Tensor out = empty_as(query, c.p.Dv);
  const Tensor lse = new_tensor({c.p.B, c.p.Hq, q.size(2)}, c.compute_type());
  c.p.os = {out.stride(1), out.stride(2)};
  for (int64_t b = 0; b < c.p.B; ++b) c.sequences[size_t(b)].out = b * out.stride(0);
  run_forward(c, out, lse, true);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal, double scale,
    const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& seed, double dropout_p, int64_t window_left, int64_t window_right, double softcap) {
  return dense_forward(query, key, value,
                       {is_causal, scale, attn_mask, alibi_slopes, sinks, seed, dropout_p, window_left, window_right,
                        softcap});
}

// Those of a call that has none.
DenseOptions no_options(bool is_causal, const Tensor& query) {
  static const OptionalTensor none;
  const int64_t D = query.dim() > 0 ? query.size(-1) : 0;
  return {is_causal, D > 0 ? 1 / std::sqrt(double(D)) : 1, none, none, none, none, 0, -1, -1, 0};
}

std::tuple<Tensor, Tensor> plain_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   bool is_causal, bool enable_gqa) {
  STD_TORCH_CHECK(enable_gqa || query.dim() != 4 || key.dim() != 4 || query.size(1) == key.size(1),
                  "fastlm::plain_attention_forward: fewer key heads need enable_gqa");
  return dense_forward(query, key, value, no_options(is_causal, query));
}

std::tuple<Tensor, Tensor> varlen_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seq_q,
    const OptionalTensor& cu_seq_k, const OptionalTensor& seqused_k, const OptionalTensor& block_table,
    int64_t max_q, int64_t max_k, int64_t window_left, int64_t window_right, double scale,
    int64_t num_splits) {
  const Tensor q = rows_contiguous(query), k = rows_contiguous(key), v = rows_contiguous(value);
  Call c = packed_call("varlen_attention_forward", q, k, v,
                       {cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k, window_left,
                        window_right, scale});
  Tensor out = new_tensor({q.size(0), c.p.Hq, c.p.Dv}, q.scalar_type());
  Tensor lse = new_tensor({c.p.Hq, q.size(0)}, c.compute_type());
  const int32_t* at = static_cast<const int32_t*>(cu_seq_q.const_data_ptr());
  if (c.p.B == 0 || at[0] > 0 || at[c.p.B] < q.size(0)) {  // rows of no sequence
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
  }
  c.p.os = {c.p.Dv, c.p.Hq * c.p.Dv};
  for (int64_t n = 0; n < c.p.B; ++n) c.sequences[size_t(n)].out = at[n] * c.p.os.t;
  run_forward(c, out, lse, num_splits != 1);
  return {out, lse};
}

// ---- backward ----

struct Gradients {
  Tensor dq, dk, dv;
};

// Owners of dK and dV: enough of them for many cores even where a batch has few key heads, each with
// some blocks of queries to itself.
void divide_backward(Call& c) {
  AttentionParams& p = c.p;
  int64_t longest = 0, keys = 0;
  for (const AttentionSequence& s : c.sequences) {
    longest = std::max(longest, s.Tq);
    keys += s.Tk;
  }
  const int64_t heads = std::max<int64_t>(p.B * p.Hkv, 1), group = p.Hkv ? p.Hq / p.Hkv : 1;
  const int64_t blocks = group * ((longest + kRowBlock - 1) / kRowBlock);
  p.parts = std::clamp<int64_t>(std::min((32 + heads - 1) / heads, blocks / 2), 1, 4);
  const bool wide = c.dtype == kF64 || c.dtype == kF32;
  if (p.parts == 1 && wide && p.D % 16 == 0 && p.Dv % 16 == 0) return;
  const int64_t row = (p.D + 15) / 16 * 16 + (p.Dv + 15) / 16 * 16;
  int64_t at = 0;
  for (AttentionSequence& s : c.sequences) {
    s.sums = at;
    at += p.Hkv * p.parts * s.Tk * row;
  }
  p.accumulators = c.hold_mutable(new_tensor({at}, c.compute_type()));
}

// What the operator returned and the gradients of it.
void set_outputs(Call& c, const char* op, const Tensor& q, const Tensor& dout, const OptionalTensor& dlse,
                 const Tensor& out, const Tensor& lse) {
  AttentionParams& p = c.p;
  check_outputs(q, p.Dv, dout, dlse, out, lse, op);
  p.out = const_cast<void*>(c.hold(out));
  p.lse = const_cast<void*>(c.hold(fastlm::contiguous(lse)));
  p.dout = c.hold(dout);
  if (dlse) p.dlse = c.hold(fastlm::contiguous(*dlse));
}

void set_gradients(Call& c, const Gradients& g) {
  c.p.dq = c.hold_mutable(g.dq);
  c.p.dk = c.hold_mutable(g.dk);
  c.p.dv = c.hold_mutable(g.dv);
  divide_backward(c);
  finish(c);
}

// A call of the backward over (B, H, T, D), and the gradients of query, key and value that it is to fill.
struct DenseBackward {
  static constexpr const char* op = "attention_backward";
  const Tensor q, k, v, dout, out;
  Call c;
  Gradients g;

  DenseBackward(const Tensor& dout_, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out_,
                const Tensor& lse, const OptionalTensor& dlse, const DenseOptions& options)
      : q(rows_contiguous(query)), k(rows_contiguous(key)), v(rows_contiguous(value)), dout(rows_contiguous(dout_)),
        out(rows_contiguous(out_)), c(dense_call(op, q, k, v, options)),
        g{empty_as(query, c.p.D), empty_as(key, c.p.D), empty_as(value, c.p.Dv)} {
    AttentionParams& p = c.p;
    set_outputs(c, op, q, dout, dlse, out, lse);
    p.os = {out.stride(1), out.stride(2)};
    p.dos = {dout.stride(1), dout.stride(2)};
    p.dqs = {g.dq.stride(1), g.dq.stride(2)};
    p.dks = {g.dk.stride(1), g.dk.stride(2)};
    p.dvs = {g.dv.stride(1), g.dv.stride(2)};
    for (int64_t b = 0; b < p.B; ++b) {
      AttentionSequence& s = c.sequences[size_t(b)];
      s.out = b * out.stride(0);
      s.dout = b * dout.stride(0);
      s.dq = b * g.dq.stride(0);
      s.dk = b * g.dk.stride(0);
      s.dv = b * g.dv.stride(0);
    }
  }

  void run() {
    set_gradients(c, g);
    kernels().attention.backward[c.dtype](c.p);
  }
};

std::tuple<Tensor, Tensor, Tensor> plain_attention_backward(const Tensor& dout, const Tensor& query, const Tensor& key,
                                                            const Tensor& value, const Tensor& out, const Tensor& lse,
                                                            bool is_causal) {
  DenseBackward backward(dout, query, key, value, out, lse, std::nullopt, no_options(is_causal, query));
  backward.run();
  return {backward.g.dq, backward.g.dk, backward.g.dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, bool is_causal, double scale, const OptionalTensor& dlse, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& seed,
    double dropout_p, int64_t window_left, int64_t window_right, double softcap, bool needs_mask,
    bool needs_slopes) {
  DenseBackward backward(dout, query, key, value, out, lse, dlse,
                         {is_causal, scale, attn_mask, alibi_slopes, sinks, seed, dropout_p, window_left,
                          window_right, softcap});
  Call& c = backward.c;
  AttentionParams& p = c.p;
  const char* const op = backward.op;
  const int64_t Tq = query.size(2), Tk = key.size(2);
  const ScalarType wide = c.compute_type();
  Tensor dmask, dslopes, dsinks;  // None where nobody asks for them
  if (sinks) {
    dsinks = new_tensor({p.Hq}, wide);
    p.dsinks = c.hold_mutable(dsinks);
  }
  if (sinks || needs_mask || needs_slopes) p.delta = c.hold_mutable(new_tensor({p.B, p.Hq, Tq}, wide));
  const bool empty = p.B == 0 || p.Hq == 0 || Tq == 0 || Tk == 0;
  if (needs_mask) {
    STD_TORCH_CHECK(attn_mask, "fastlm::", op, ": needs_mask without attn_mask");
    dmask = new_tensor({p.bias_b, p.bias_h, p.bias_q, p.bias_k}, wide);
    if (empty) torch::stable::zero_(dmask);
    else p.dbias = c.hold_mutable(dmask);
  }
  if (needs_slopes) {
    STD_TORCH_CHECK(alibi_slopes, "fastlm::", op, ": needs_slopes without alibi_slopes");
    dslopes = new_tensor({p.B, p.Hq}, wide);
    if (empty) torch::stable::zero_(dslopes);
    else p.dslopes = c.hold_mutable(dslopes);
  }
  backward.run();
  if (p.dbias || p.dslopes) kernels().attention.bias_backward[c.dtype](p);
  return {backward.g.dq, backward.g.dk, backward.g.dv, dmask, dslopes, dsinks};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& dout_, const OptionalTensor& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out_, const Tensor& lse, const Tensor& cu_seq_q, const Tensor& cu_seq_k, int64_t max_q,
    int64_t max_k, int64_t window_left, int64_t window_right, double scale) {
  const char* const op = "varlen_attention_backward";
  const Tensor q = rows_contiguous(query), k = rows_contiguous(key), v = rows_contiguous(value);
  const Tensor dout = rows_contiguous(dout_), out = rows_contiguous(out_);
  Call c = packed_call(op, q, k, v,
                       {cu_seq_q, cu_seq_k, std::nullopt, std::nullopt, max_q, max_k, window_left,
                        window_right, scale});
  AttentionParams& p = c.p;
  set_outputs(c, op, q, dout, dlse, out, lse);
  Gradients g{new_tensor({q.size(0), p.Hq, p.D}, q.scalar_type()),
              new_tensor({k.size(0), p.Hkv, p.D}, q.scalar_type()),
              new_tensor({k.size(0), p.Hkv, p.Dv}, q.scalar_type())};
  p.os = {out.stride(1), out.stride(0)};
  p.dos = {dout.stride(1), dout.stride(0)};
  p.dqs = {p.D, p.Hq * p.D};
  p.dks = {p.D, p.Hkv * p.D};
  p.dvs = {p.Dv, p.Hkv * p.Dv};
  const int32_t* const q_at = static_cast<const int32_t*>(cu_seq_q.const_data_ptr());
  const int32_t* const k_at = static_cast<const int32_t*>(cu_seq_k.const_data_ptr());
  if (p.B == 0 || q_at[0] > 0 || q_at[p.B] < q.size(0)) torch::stable::zero_(g.dq);  // rows of no sequence
  if (p.B == 0 || k_at[0] > 0 || k_at[p.B] < k.size(0)) {
    torch::stable::zero_(g.dk);
    torch::stable::zero_(g.dv);
  }
  for (int64_t n = 0; n < p.B; ++n) {
    AttentionSequence& s = c.sequences[size_t(n)];
    s.out = q_at[n] * p.os.t;
    s.dout = q_at[n] * p.dos.t;
    s.dq = q_at[n] * p.dqs.t;
    s.dk = k_at[n] * p.dks.t;
    s.dv = k_at[n] * p.dvs.t;
  }
  set_gradients(c, g);
  kernels().attention.backward[c.dtype](p);
  return {g.dq, g.dk, g.dv};
}

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("plain_attention_backward", TORCH_BOX(&plain_attention_backward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("plain_attention_forward", TORCH_BOX(&plain_attention_forward));
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_attention_forward));
}

}  // namespace
}  // namespace fastlm
