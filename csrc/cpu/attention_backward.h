// Attention's backward: weights are recomputed from lse, never stored (FlashAttention-2, section 3.1).
//
//   P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - delta)   dQ = dS K   dK = dS^T Q
//   delta = rowsum(dO O) - dlse, which carries the gradient of lse too
//
// Five products per tile of scores. A block of queries is packed once and meets its keys in order; its
// dQ stays in cache while dK and dV of its key head grow in memory. One thread owns these sums: the
// queries of a key head are dealt to `parts` owners, by shape alone, whose sums are added in order at
// the end. A gradient of the mask or of the ALiBi slopes has a pass of its own, owned by its elements.
#pragma once
#include "attention_forward.h"

namespace fastlm::FASTLM_ISA {

inline constexpr int64_t kPadding = 16;  // columns of accumulators are padded to a multiple of this

template <class S> struct BackwardScratch {
  using T = compute_t<S>;
  using E = operand_t<S>;
  RowBlock<T> rows;
  E *q, *dout;            // [D][width], [Dv][width]
  KeyRows<E> q_rows, dout_rows;  // [n][>= D], [n][>= Dv]: natural rows (paired along n where paired)
  E *q_copy, *dout_copy, *k, *v, *k_turned, *tmp;
  T *scores, *dscores;    // [kKeyBlock][width]
  E *weights, *ds_rows, *ds_columns;  // operands made of them; the tiles themselves unless paired
  T *dq, *lse, *delta, *keep;
  ScoreScratch<T> score;
};

template <class S> struct BackwardArena {
  Arena arena;
  explicit BackwardArena(const AttentionParams& p) {
    const int64_t widest = greatest(greatest(p.D, p.Dv), kKeyBlock);
    const int64_t numbers = kRowBlock * (2 * p.D + p.Dv + spread(p.D) + spread(p.Dv) + widest + 8 * kKeyBlock + 16) +
                            kKeyBlock * (2 * spread(p.D) + spread(p.Dv));
    arena.at = static_cast<char*>(
        thread_scratch(kScratchKernel, size_t(numbers) * sizeof(compute_t<S>) + 8192));
  }
};

// Natural rows of a block of queries as the right operand: [n][columns], zeros behind D.
template <class S, class T>
KeyRows<operand_t<S>> rows_as_operand(const RowBlock<T>& rows, const S* src, AttentionStrides s, int64_t D,
                                      operand_t<S>* copy) {
  const int64_t ld = spread(D);
  if constexpr (Operand<S>::kPair == 2) {
    for (int64_t r = 0; r < rows.n; r += 2) {
      const bf16* odd = r + 1 < rows.n ? src + row_offset(rows, s, r + 1) : nullptr;
      Pack<uint32_t>::across(D, src + row_offset(rows, s, r), 1, odd, copy + r / 2 * ld);
      for (int64_t d = D; d < ld; ++d) copy[r / 2 * ld + d] = 0;
    }
  } else {
    gather_rows(rows, src, s, D, rows.n, copy, ld);
  }
  return {copy, ld};
}

// Packs a block of queries with its dout, lse and delta.
template <class S>
BackwardScratch<S> backward_block(const AttentionParams& p, const AttentionItem& item) {
  using T = compute_t<S>;
  using E = operand_t<S>;
  BackwardArena<S> space(p);
  Arena& arena = space.arena;
  BackwardScratch<S> x;
  x.rows = row_block<T>(p, item, arena);
  const RowBlock<T>& rows = x.rows;
  const AttentionSequence& seq = *rows.seq;
  const int64_t W = rows.width, widest = greatest(greatest(p.D, p.Dv), kKeyBlock);
  x.q = arena.take<E>(W * (p.D + 1));
  x.dout = arena.take<E>(W * (p.Dv + 1));
  x.q_copy = arena.take<E>(W * spread(p.D));
  x.dout_copy = arena.take<E>(W * spread(p.Dv));
  x.tmp = arena.take<E>(W * (widest + 1));
  x.k = arena.take<E>(kKeyBlock * spread(p.D));
  x.v = arena.take<E>(kKeyBlock * spread(p.Dv));
  x.scores = arena.take<T>(W * kKeyBlock);
  x.dscores = arena.take<T>(W * kKeyBlock);
  if constexpr (Operand<S>::kPair == 2) {
    x.k_turned = arena.take<E>(kKeyBlock / 2 * spread(p.D));
    x.weights = arena.take<E>(W * kKeyBlock / 2);
    x.ds_rows = arena.take<E>(W * kKeyBlock / 2);
    x.ds_columns = arena.take<E>(W * kKeyBlock / 2);
  } else {
    x.k_turned = x.k;
    x.weights = x.scores;
    x.ds_rows = x.ds_columns = x.dscores;
  }
  x.dq = arena.take<T>(W * p.D);
  x.lse = arena.take<T>(W);
  x.delta = arena.take<T>(W);
  x.keep = p.dropout ? arena.take<T>(W * kKeyBlock) : nullptr;
  x.score = {};
  if (p.mask_kind != kNoMask) {
    x.score.mask = arena.take<T>(W * kKeyBlock);
    x.score.mask_tmp = arena.take<T>(W * kKeyBlock);
  }
  if (p.softcap > 0) x.score.slope = arena.take<T>(W * kKeyBlock);

  const S* const q = static_cast<const S*>(p.q) + seq.q;
  const S* const dout = static_cast<const S*>(p.dout) + seq.dout;
  const S* const out = static_cast<const S*>(p.out) + seq.out;
  pack_queries<S>(rows, q, p.qs, p.D, x.q, x.tmp);
  pack_queries<S>(rows, dout, p.dos, p.Dv, x.dout, x.tmp);
  x.q_rows = rows_as_operand<S>(rows, q, p.qs, p.D, x.q_copy);
  x.dout_rows = rows_as_operand<S>(rows, dout, p.dos, p.Dv, x.dout_copy);
  __builtin_memset(x.dq, 0, size_t(W * p.D) * sizeof(T));
  for (int64_t r = 0; r < rows.n; ++r) {
    const int64_t at = seq.lse + rows.h(r) * p.lse_h + rows.i(r);
    const S *g = dout + row_offset(rows, p.dos, r), *o = out + row_offset(rows, p.os, r);
    Vec<T> sum{};
    int64_t d = 0;
    for (; d + kLanes<T> <= p.Dv; d += kLanes<T>) sum = fma(load<T>(g + d), load<T>(o + d), sum);
    if (d < p.Dv) sum = fma(load<T>(g + d, p.Dv - d), load<T>(o + d, p.Dv - d), sum);
    const T lse = static_cast<const T*>(p.lse)[at];
    T* const delta = static_cast<T*>(p.delta);
    x.delta[r] = p.delta_given ? delta[at] : reduce_add(sum) - (p.dlse ? static_cast<const T*>(p.dlse)[at] : T(0));
    // A row without any key has lse -inf and weights 0.
    x.lse[r] = lse == -T(__builtin_inf()) ? T(__builtin_inf()) : lse;
    if (delta && !p.delta_given) delta[at] = x.delta[r];
  }
  for (int64_t r = rows.n; r < W; ++r) {
    x.lse[r] = T(__builtin_inf());
    x.delta[r] = T(0);
  }
  return x;
}

// P (dropped and rescaled) and dS of one tile; dS is the gradient of q.k, or with kBias of the score
// as it enters the softmax.
template <class S, bool kBias>
void tile_gradients(const AttentionParams& p, BackwardScratch<S>& x, const KeyRange& keys,
                    const KeyRows<operand_t<S>>& k, const KeyRows<operand_t<S>>& v) {
  using T = compute_t<S>;
  using V = Vec<T>;
  using Mul = typename Operand<S>::Mul;
  constexpr int64_t kPair = Operand<S>::kPair;
  const int64_t ld = x.rows.width, begin = keys.begin, lanes = keys.end - keys.begin;
  matmul<Mul, kRowMajor, kOverwrite>(keys.n, lanes, ceil_div(p.D, kPair), k.data, k.ld, x.q + begin, ld,
                                     x.scores + begin, ld);
  finish_scores<T, S, true>(p, x.rows, keys, x.scores, x.score);
  matmul<Mul, kRowMajor, kOverwrite>(keys.n, lanes, ceil_div(p.Dv, kPair), v.data, v.ld, x.dout + begin, ld,
                                     x.dscores + begin, ld);
  if (x.keep) dropout_tile(p, x.rows, keys, x.keep);

  const V unit = splat(score_unit<T>(p)), log = splat(kLog<S>), scale = splat(kBias ? T(1) : T(p.scale));
  const bool capped = !kBias && p.softcap > 0;
  for (int64_t j = 0; j < keys.n; j += kPair)
    for (int64_t r = begin; r < keys.end; r += kLanes<T>) {
      V w[kPair], ds[kPair];
#pragma GCC unroll 2
      for (int64_t y = 0; y < kPair; ++y) {
        w[y] = ds[y] = V{};
        if (y > 0 && j + y == keys.n) break;
        const int64_t at = (j + y) * ld + r;
        w[y] = softmax_exp<S>((load(x.scores + at) * unit - load(x.lse + r)) * log);
        V dw = load(x.dscores + at);
        if (x.keep) dw *= load(x.keep + at);
        ds[y] = w[y] * ((dw - load(x.delta + r)) * scale);
        if (capped) ds[y] *= load(x.score.slope + at);
        if (x.keep) w[y] *= load(x.keep + at);
        if (kPair == 1 || kBias) store(x.dscores + at, ds[y]);
      }
      if constexpr (kPair == 2) {
        bf16* const weights = reinterpret_cast<bf16*>(x.weights) + j * ld + r;
        bf16* const ds_rows = reinterpret_cast<bf16*>(x.ds_rows) + j * ld + r;
        store_pair(weights, weights + ld, w[0], w[1]);
        const Words pair = store_pair(ds_rows, ds_rows + ld, ds[0], ds[1]);
        __builtin_memcpy(x.ds_columns + j / 2 * ld + r, &pair, sizeof pair);
      } else {
        store(x.weights + j * ld + r, w[0]);
      }
    }
}

// Sums of dK and dV of one owner: rows of D and Dv columns.
template <class T> struct KeySums {
  T *dk, *dv;
  int64_t dk_ld, dv_ld;
};

template <class S>
void backward_tile(const AttentionParams& p, BackwardScratch<S>& x, const KeyRange& keys,
                   const KeySource<S>& key, const KeySource<S>& value, const KeySums<compute_t<S>>& sums) {
  using Mul = typename Operand<S>::Mul;
  constexpr int64_t kPair = Operand<S>::kPair;
  const int64_t ld = x.rows.width, begin = keys.begin;
  // Without pairs one copy of the keys serves both products that read them.
  const auto k = kPair == 1 ? rows_along_rows(key, keys.j0, keys.n, x.k) : rows_along_columns(key, keys.j0, keys.n, x.k);
  const auto v = rows_along_columns(value, keys.j0, keys.n, x.v);
  tile_gradients<S, false>(p, x, keys, k, v);

  const int64_t queries = ceil_div(least(keys.end, x.rows.n) - begin, kPair), lda = ld / kPair;
  const int64_t first = begin / kPair;
  matmul<Mul, kRowMajor, kAccumulate>(keys.n, round_up(p.Dv, kPadding), queries, x.weights + first, lda,
                                      x.dout_rows.data + first * x.dout_rows.ld, x.dout_rows.ld,
                                      sums.dv + keys.j0 * sums.dv_ld, sums.dv_ld);
  matmul<Mul, kRowMajor, kAccumulate>(keys.n, round_up(p.D, kPadding), queries, x.ds_rows + first, lda,
                                      x.q_rows.data + first * x.q_rows.ld, x.q_rows.ld,
                                      sums.dk + keys.j0 * sums.dk_ld, sums.dk_ld);
  KeyRows<operand_t<S>> turned = k;
  if constexpr (kPair == 2) turned = rows_along_rows(key, keys.j0, keys.n, x.k_turned);
  matmul<Mul, kColMajor, kAccumulate>(p.D, keys.end - begin, ceil_div(keys.n, kPair), turned.data, turned.ld,
                                      x.ds_columns + begin, ld, x.dq + begin, ld);
}

template <class S>
void backward_rows(const AttentionParams& p, const AttentionItem& item, const KeySums<compute_t<S>>& sums) {
  using T = compute_t<S>;
  BackwardScratch<S> x = backward_block<S>(p, item);
  const RowBlock<T>& rows = x.rows;
  const AttentionSequence& seq = *rows.seq;
  const KeySource<S> key = key_source<S>(p, seq, rows.hkv), value = value_source<S>(p, seq, rows.hkv);
  const int64_t end = keys_end(rows);
  for (int64_t j = keys_begin(rows); j < end; j += kKeyBlock) {
    const KeyRange keys = key_range(rows, j, least(kKeyBlock, end - j));
    if (keys.begin < keys.end) backward_tile(p, x, keys, key, value, sums);
  }
  T* const turned = reinterpret_cast<T*>(x.tmp);
  transpose(p.D, rows.n, x.dq, rows.width, turned, p.D);
  S* const dq = static_cast<S*>(p.dq) + seq.dq;
  for (int64_t r = 0; r < rows.n; ++r)
    RowSink<S>::store_row(p.D, turned + r * p.D, dq + row_offset(rows, p.dqs, r));
}

// ---- owners of dK and dV ----

// Block n of the queries of a key head, head by head; false behind the last.
inline bool block_of(const AttentionSequence& s, int64_t group, int64_t n, int64_t* row, int64_t* rows) {
  if (group * s.Tq <= kRowBlock) {
    *row = 0;
    *rows = group * s.Tq;
    return n == 0 && *rows > 0;
  }
  const int64_t blocks = ceil_div(s.Tq, kRowBlock), size = round_up<int64_t>(ceil_div(s.Tq, blocks), 24);
  const int64_t per_head = ceil_div(s.Tq, size), i = n % per_head * size;
  *row = n / per_head * s.Tq + i;
  *rows = least(size, s.Tq - i);
  return n < group * per_head;
}

template <class S>
KeySums<compute_t<S>> key_sums(const AttentionParams& p, const AttentionSequence& s, int64_t hkv, int64_t part) {
  using T = compute_t<S>;
  if (!p.accumulators)  // the gradients themselves
    return {static_cast<T*>(p.dk) + s.dk + hkv * p.dks.h, static_cast<T*>(p.dv) + s.dv + hkv * p.dvs.h,
            p.dks.t, p.dvs.t};
  const int64_t D = round_up(p.D, kPadding), Dv = round_up(p.Dv, kPadding);
  T* const at = static_cast<T*>(p.accumulators) + s.sums + (hkv * p.parts + part) * s.Tk * (D + Dv);
  return {at, at + s.Tk * D, D, Dv};
}

template <class S>
void backward_part(const AttentionParams& p, int64_t b, int64_t hkv, int64_t part) {
  using T = compute_t<S>;
  const AttentionSequence& s = p.sequences[b];
  const KeySums<T> sums = key_sums<S>(p, s, hkv, part);
  const int64_t D = p.accumulators ? sums.dk_ld : p.D, Dv = p.accumulators ? sums.dv_ld : p.Dv;
  for (int64_t j = 0; j < s.Tk; ++j) {
    __builtin_memset(sums.dk + j * sums.dk_ld, 0, size_t(D) * sizeof(T));
    __builtin_memset(sums.dv + j * sums.dv_ld, 0, size_t(Dv) * sizeof(T));
  }
  AttentionItem item = {int32_t(b), int32_t(hkv), 0, 0, -1};
  for (int64_t n = part; block_of(s, p.Hq / p.Hkv, n, &item.row, &item.rows); n += p.parts)
    backward_rows<S>(p, item, sums);
}

// dK and dV from the sums of all parts, for keys begin .. end of one key head.
template <class S>
void finish_keys(const AttentionParams& p, int64_t b, int64_t hkv, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const AttentionSequence& s = p.sequences[b];
  const KeySums<T> total = key_sums<S>(p, s, hkv, 0);
  for (int64_t j = begin; j < end; ++j) {
    T *const dk = total.dk + j * total.dk_ld, *const dv = total.dv + j * total.dv_ld;
    for (int64_t part = 1; part < p.parts; ++part) {
      const KeySums<T> more = key_sums<S>(p, s, hkv, part);
      for (int64_t d = 0; d < p.D; ++d) dk[d] += more.dk[j * more.dk_ld + d];
      for (int64_t d = 0; d < p.Dv; ++d) dv[d] += more.dv[j * more.dv_ld + d];
    }
    RowSink<S>::store_row(p.D, dk, static_cast<S*>(p.dk) + s.dk + hkv * p.dks.h + j * p.dks.t);
    RowSink<S>::store_row(p.Dv, dv, static_cast<S*>(p.dv) + s.dv + hkv * p.dvs.h + j * p.dvs.t);
  }
}

// dsink[h] = -sum over b, i of exp(sink - lse) delta
template <class T> void sink_gradients(const AttentionParams& p) {
  parallel(p.pool, p.Hq, 1, [&](int64_t from, int64_t to) {
    for (int64_t h = from; h < to; ++h) {
      const Vec<T> sink = splat(static_cast<const T*>(p.sinks)[h]), none = splat(-T(__builtin_inf()));
      Vec<T> sum{};
      for (int64_t b = 0; b < p.B; ++b) {
        const AttentionSequence& s = p.sequences[b];
        const T* lse = static_cast<const T*>(p.lse) + s.lse + h * p.lse_h;
        const T* delta = static_cast<const T*>(p.delta) + s.lse + h * p.lse_h;
        for (int64_t i = 0; i < s.Tq; i += kLanes<T>) {
          const int64_t n = least<int64_t>(kLanes<T>, s.Tq - i);
          const Vec<T> sums = load(lse + i, n), x = load(delta + i, n) * softmax_exp<T>((sink - sums) * splat(kLog<T>));
          // A row without any key has lse -inf, and so has its sink.
          sum -= select(first_lanes<T>(n) & (sums != none), x, Vec<T>{});
        }
      }
      static_cast<T*>(p.dsinks)[h] = reduce_add(sum);
    }
  });
}

template <class S> void attention_backward(const AttentionParams& p) {
  const int64_t owners = p.Hkv * p.parts;
  parallel_items(p.pool, p.B * owners, [&](int64_t n) {
    const int64_t b = n / owners, hkv = n % owners / p.parts;
    backward_part<S>(p, b, hkv, n % p.parts);
    if (p.accumulators && p.parts == 1) finish_keys<S>(p, b, hkv, 0, p.sequences[b].Tk);
  });
  if (p.parts > 1) {
    constexpr int64_t kRun = 256;
    int64_t longest = 0;
    for (int64_t b = 0; b < p.B; ++b) longest = greatest(longest, p.sequences[b].Tk);
    const int64_t runs = ceil_div(longest, kRun);
    parallel_items(p.pool, p.B * p.Hkv * runs, [&](int64_t n) {
      const int64_t b = n / (p.Hkv * runs), j = n % runs * kRun;
      finish_keys<S>(p, b, n / runs % p.Hkv, j, least(j + kRun, p.sequences[b].Tk));
    });
  }
  if (p.dsinks) sink_gradients<compute_t<S>>(p);
}

// ---- gradients of the mask and of the ALiBi slopes ----

// Which elements of the scores an element of a bias stands for, and how they count.
template <class T> struct BiasGradient {
  T* out;              // [B or 1][Hq or 1][Tq or 1][Tk or 1]
  int64_t b, h, q, k;  // its sizes
  bool distance;       // times -|i + Tk - Tq - j|: the bias is a slope
};

// acc[key][lane] += dS over one tile, of the block's rows that exist.
template <class T>
void add_tile(const RowBlock<T>& rows, const KeyRange& keys, const T* ds, bool distance, T* acc) {
  using V = Vec<T>;
  const int64_t ld = rows.width;
  for (int64_t j = 0; j < keys.n; ++j) {
    const V shift = splat(T(rows.first + rows.seq->Tk - rows.seq->Tq - (keys.j0 + j)));
    for (int64_t r = keys.begin; r < keys.end; r += kLanes<T>) {
      V x = load(ds + j * ld + r);
      if (distance) x *= -abs(load(rows.index + r) + shift);
      x = select(first_lanes<T>(least<int64_t>(rows.n - r, kLanes<T>)), x, V{});
      store(acc + j * kRowBlock + r, load(acc + j * kRowBlock + r) + x);
    }
  }
}

// One tile of a bias: the sum over every tile of scores that it was broadcast to, in order.
template <class S>
void bias_tile(const AttentionParams& p, const BiasGradient<compute_t<S>>& bias, int64_t b0, int64_t h0,
               int64_t q_tile, int64_t k_tile) {
  using T = compute_t<S>;
  const int64_t Tq = p.sequences[0].Tq, Tk = p.sequences[0].Tk, group = p.Hq / p.Hkv;
  const bool all_q = bias.q < Tq, all_k = bias.k < Tk, all_b = bias.b < p.B, all_h = bias.h < p.Hq;
  T* const acc = static_cast<T*>(thread_scratch(kScratchTile, (kKeyBlock + 1) * kRowBlock * sizeof(T)));
  for (int64_t n = 0; n < kKeyBlock * kRowBlock; ++n) acc[n] = T(0);

  for (int64_t b = all_b ? 0 : b0; b < (all_b ? p.B : b0 + 1); ++b)
    for (int64_t h = all_h ? 0 : h0; h < (all_h ? p.Hq : h0 + 1); ++h)
      for (int64_t i = all_q ? 0 : q_tile * kRowBlock; i < (all_q ? Tq : least(Tq, (q_tile + 1) * kRowBlock));
           i += kRowBlock) {
        const AttentionItem item = {int32_t(b), int32_t(h / group), h % group * Tq + i, least(kRowBlock, Tq - i), -1};
        const AttentionSequence& seq = p.sequences[b];
        // Nothing to pack for tiles that no query of the block sees.
        const int64_t low = greatest<int64_t>(i - seq.lower, 0) / kKeyBlock * kKeyBlock;
        const int64_t high = least(Tk, greatest<int64_t>(i + item.rows - 1 + seq.upper + 1, 0));
        const int64_t from = all_k ? low : k_tile * kKeyBlock, to = all_k ? high : least(high, from + kKeyBlock);
        if (from < low || from >= to) continue;
        BackwardScratch<S> x = backward_block<S>(p, item);
        const KeySource<S> key = key_source<S>(p, seq, item.hkv), value = value_source<S>(p, seq, item.hkv);
        for (int64_t j = from; j < to; j += kKeyBlock) {
          const KeyRange keys = key_range(x.rows, j, least(kKeyBlock, to - j));
          if (keys.begin >= keys.end) continue;
          const auto k = rows_along_columns(key, keys.j0, keys.n, x.k);
          const auto v = rows_along_columns(value, keys.j0, keys.n, x.v);
          tile_gradients<S, true>(p, x, keys, k, v);
          add_tile(x.rows, keys, x.dscores, bias.distance, acc);
        }
      }

  const int64_t rows = all_q ? 1 : least(kRowBlock, Tq - q_tile * kRowBlock);
  const int64_t columns = all_k ? 1 : least(kKeyBlock, Tk - k_tile * kKeyBlock);
  if (all_k)
    for (int64_t j = 1; j < kKeyBlock; ++j)
      for (int64_t r = 0; r < kRowBlock; ++r) acc[r] += acc[j * kRowBlock + r];
  if (all_q)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t r = 1; r < kRowBlock; ++r) acc[j * kRowBlock] += acc[j * kRowBlock + r];
  T* const out = bias.out + ((b0 * bias.h + h0) * bias.q + q_tile * kRowBlock) * bias.k + k_tile * kKeyBlock;
  transpose(columns, rows, acc, kRowBlock, out, bias.k);
}

template <class S> void bias_gradient(const AttentionParams& p, const BiasGradient<compute_t<S>>& bias) {
  const int64_t Tq = p.sequences[0].Tq, Tk = p.sequences[0].Tk;
  const int64_t q_tiles = bias.q < Tq ? 1 : ceil_div(Tq, kRowBlock), k_tiles = bias.k < Tk ? 1 : ceil_div(Tk, kKeyBlock);
  parallel_items(p.pool, bias.b * bias.h * q_tiles * k_tiles, [&](int64_t n) {
    const int64_t k = n % k_tiles, q = n / k_tiles % q_tiles, h = n / (k_tiles * q_tiles) % bias.h;
    bias_tile<S>(p, bias, n / (k_tiles * q_tiles * bias.h), h, q, k);
  });
}

// delta of a block of queries as rowsum(P dP) - dlse. In exact arithmetic that is rowsum(dO O) - dlse,
// but O was rounded to 16 bits, and sums of dS over many queries, which largely cancel, would show it.
template <class S> void exact_delta(const AttentionParams& p, const AttentionItem& item) {
  using T = compute_t<S>;
  BackwardScratch<S> x = backward_block<S>(p, item);
  const RowBlock<T>& rows = x.rows;
  const AttentionSequence& seq = *rows.seq;
  T sum[kRowBlock] = {};
  for (int64_t r = 0; r < rows.width; ++r) x.delta[r] = T(0);
  const KeySource<S> key = key_source<S>(p, seq, rows.hkv), value = value_source<S>(p, seq, rows.hkv);
  const int64_t end = keys_end(rows);
  for (int64_t j = keys_begin(rows); j < end; j += kKeyBlock) {
    const KeyRange keys = key_range(rows, j, least(kKeyBlock, end - j));
    if (keys.begin >= keys.end) continue;
    const auto k = rows_along_columns(key, keys.j0, keys.n, x.k);
    const auto v = rows_along_columns(value, keys.j0, keys.n, x.v);
    tile_gradients<S, true>(p, x, keys, k, v);
    for (int64_t y = 0; y < keys.n; ++y)
      for (int64_t r = keys.begin; r < keys.end; ++r) sum[r] += x.dscores[y * rows.width + r];
  }
  for (int64_t r = 0; r < rows.n; ++r) {
    const int64_t at = seq.lse + rows.h(r) * p.lse_h + rows.i(r);
    static_cast<T*>(p.delta)[at] = sum[r] - (p.dlse ? static_cast<const T*>(p.dlse)[at] : T(0));
  }
}

// Gradients of the mask and the slopes, each if asked for. Dense batches only, none of them empty.
template <class S> void attention_bias_backward(const AttentionParams& params) {
  using T = compute_t<S>;
  AttentionParams p = params;
  if (sizeof(S) < sizeof(T)) {
    p.delta_given = false;
    const int64_t Tq = p.sequences[0].Tq, tiles = ceil_div(Tq, kRowBlock), group = p.Hq / p.Hkv;
    parallel_items(p.pool, p.B * p.Hq * tiles, [&](int64_t n) {
      const int64_t i = n % tiles * kRowBlock, h = n / tiles % p.Hq;
      exact_delta<S>(p, {int32_t(n / (tiles * p.Hq)), int32_t(h / group), h % group * Tq + i, least(kRowBlock, Tq - i), -1});
    });
    p.delta_given = true;
  } else {
    p.delta = nullptr;
  }
  if (p.dbias) bias_gradient<S>(p, {static_cast<T*>(p.dbias), p.bias_b, p.bias_h, p.bias_q, p.bias_k, false});
  if (p.dslopes) bias_gradient<S>(p, {static_cast<T*>(p.dslopes), p.B, p.Hq, 1, 1, true});
}

}  // namespace fastlm::FASTLM_ISA
