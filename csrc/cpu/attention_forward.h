// Attention's forward: online softmax (Milakov and Gimelshein, 2018) over blocks of keys.
//
// A block of up to kRowBlock queries stays in cache, packed [D][lane]; each block of keys gives a tile
// of scores S^T = K Q^T, exponentials in place, and O^T += V^T P^T. They are relative to a number that
// follows a row's maximum only where it rises far: to rescale O at every rise took 3 % of the time. Few
// queries (decoding) take vectors along D instead, since nothing but the reading of K and V matters then.
// Where there are few queries the keys are split too, by shape alone; each split leaves a normalised O and
// its lse to be combined.
#pragma once
#include "attention_tile.h"

namespace fastlm::FASTLM_ISA {

inline constexpr int64_t kFewRows = 4;  // up to here vectors lie along D
// A tile of a block of queries: its scores are finished kPanel queries at a time, so that they stay in the first-level
// cache with what they are multiplied by, and its part of the output is added for so many keys at once.
inline constexpr int64_t kPanel = 48, kForwardKeys = 128;

// What turns a row's weights of sum l under maximum m into probabilities, with its sink's logit joined
// to the sum. All in natural units.
template <class T> struct Normaliser { T scale, lse; };

template <class T> Normaliser<T> normalise(T m, T l, const T* sink) {
  const T inf = T(__builtin_inf());
  if (sink) {
    const T top = *sink <= m ? m : *sink;  // a NaN among the two is not lost: l of a row with one is NaN
    if (top == -inf) return {T(0), -inf};
    const T ratio = exp_scalar(m - top), sum = l * ratio + exp_scalar(*sink - top);
    return {ratio / sum, top + log(sum)};
  }
  if (l == 0) return {T(0), -inf};
  return {T(1) / l, m + log(l)};
}

// Where a row's results go: the output, or the partial results of its split.
template <class S> struct RowSink {
  using T = compute_t<S>;
  const AttentionParams& p;
  const AttentionItem& item;
  const RowBlock<T>& rows;

  int64_t partial_row(int64_t r) const {
    const AttentionSequence& s = *rows.seq;
    return s.partial + (item.hkv * s.splits + item.split) * rows.group * s.Tq + rows.row + r;
  }
  const T* sink(int64_t r) const {
    return p.sinks && item.split < 0 ? static_cast<const T*>(p.sinks) + rows.h(r) : nullptr;
  }
  void put_lse(int64_t r, T lse) const {
    if (item.split >= 0) static_cast<T*>(p.partial_lse)[partial_row(r)] = lse;
    else static_cast<T*>(p.lse)[rows.seq->lse + rows.h(r) * p.lse_h + rows.i(r)] = lse;
  }
  void put_row(int64_t r, const T* o) const {
    if (item.split >= 0) {
      __builtin_memcpy(static_cast<T*>(p.partial_out) + partial_row(r) * p.Dv, o, size_t(p.Dv) * sizeof(T));
      return;
    }
    store_row(p.Dv, o, static_cast<S*>(p.out) + rows.seq->out + row_offset(rows, p.os, r));
  }
  static void store_row(int64_t n, const T* src, S* dst) {
    int64_t d = 0;
    for (; d + kLanes<T> <= n; d += kLanes<T>) store(dst + d, load(src + d));
    if (d < n) store(dst + d, load(src + d, n - d), n - d);
  }
};

// ---- blocks of queries ----

// How far above m a score may lie, in units of the exponential: weights up to 2^8, or e^8, add up as exactly.
template <class T> inline constexpr T kHeadroom = 8;

// A score as what is subtracted from others, and the weight of a score: in 16 bits the product with the factor
// is part of the difference, whose error is the same for all of a row.
template <class S, class V = Vec<compute_t<S>>> FASTLM_INLINE V reference(V s, V factor) {
  return kRoughWeights<S> ? s * factor : s;
}
template <class S, class V = Vec<compute_t<S>>> FASTLM_INLINE V weight(V s, V factor, V reference) {
  return softmax_exp<S>(kRoughWeights<S> ? fma(s, factor, -reference) : (s - reference) * factor);
}

// One tile's softmax over kV vectors of lanes: m, which no score of theirs exceeds by more than the headroom, weights
// exp(s - m) as operand, sums l; alpha is what earlier sums and outputs are to be multiplied by. Returns lanes where
// that is not 1.
template <class S, int kV>
FASTLM_INLINE mask_t<Vec<compute_t<S>>> softmax_columns(
    int64_t n, int64_t ld, compute_t<S> factor, compute_t<S>* s, const compute_t<S>* keep,
    compute_t<S>* m, compute_t<S>* l, compute_t<S>* alpha, operand_t<S>* weights) {
  using T = compute_t<S>;
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  V top[kV], sum[kV], shift[kV];
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) top[v] = load(m + v * kL);
  for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) top[v] = max(top[v], load(s + j * ld + v * kL));

  const V f = splat(factor), none = splat(-T(__builtin_inf()));
  mask_t<V> changed{};
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) {
    const V old = load(m + v * kL);
    top[v] = select((top[v] - old) * f > splat(kHeadroom<T>), top[v], old);
    shift[v] = select(top[v] == none, V{}, top[v]);
    shift[v] = reference<S>(shift[v], f);
    const V a = weight<S>(old, f, shift[v]);
    changed |= a != splat(T(1));
    store(alpha + v * kL, a);
    store(m + v * kL, top[v]);
    sum[v] = load(l + v * kL) * a;
  }
  constexpr int64_t kPair = Operand<S>::kPair;
  for (int64_t j = 0; j < n; j += kPair) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      V w[kPair];
#pragma GCC unroll 2
      for (int64_t x = 0; x < kPair; ++x) {
        w[x] = V{};
        if (x > 0 && j + x == n) break;
        const int64_t at = (j + x) * ld + v * kL;
        w[x] = weight<S>(load(s + at), f, shift[v]);
        sum[v] += w[x];
        if (keep) w[x] *= load(keep + at);
      }
      if constexpr (kPair == 2) {
        const Words pair = pair_bf16(w[0], w[1]);
        __builtin_memcpy(weights + j / 2 * ld + v * kL, &pair, sizeof pair);
      } else {
        store(weights + j * ld + v * kL, w[0]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kV; ++v) store(l + v * kL, sum[v]);
  return changed;
}

template <class V> FASTLM_INLINE bool any(V mask) {
  bool found = false;
  for (size_t i = 0; i < sizeof(V) / sizeof(mask[0]); ++i) found |= mask[i] != 0;
  return found;
}

template <class S> struct ForwardScratch {
  using T = compute_t<S>;
  using E = operand_t<S>;
  RowBlock<T> rows;
  E *q, *k, *v, *weights, *tmp;
  T *scores, *out, *m, *l, *alpha, *keep;
  ScoreScratch<T> score;
};

template <class S>
ForwardScratch<S> forward_scratch(const AttentionParams& p, const AttentionItem& item) {
  using T = compute_t<S>;
  using E = operand_t<S>;
  const int64_t widest = greatest(greatest(p.D, p.Dv), kForwardKeys);
  const int64_t numbers = kRowBlock * (p.D + p.Dv + 3 * widest + 5 * kForwardKeys + 16) +
                          kForwardKeys * (spread(p.D) + spread(p.Dv));
  Arena arena{static_cast<char*>(thread_scratch(kScratchKernel, size_t(numbers) * sizeof(T) + 4096))};
  ForwardScratch<S> x;
  x.rows = row_block<T>(p, item, arena);
  const int64_t W = x.rows.width;
  x.q = arena.take<E>(W * (p.D + 1));
  x.out = arena.take<T>(W * p.Dv);
  x.scores = arena.take<T>(W * kForwardKeys);
  x.m = arena.take<T>(W);
  x.l = arena.take<T>(W);
  x.alpha = arena.take<T>(W);
  x.k = arena.take<E>(kForwardKeys * spread(p.D));
  x.v = arena.take<E>(kForwardKeys * spread(p.Dv));
  if constexpr (Operand<S>::kPair == 2) x.weights = arena.take<E>(W * kForwardKeys / 2);
  else x.weights = x.scores;
  x.tmp = arena.take<E>(W * (widest + 1));
  x.keep = p.dropout ? arena.take<T>(W * kForwardKeys) : nullptr;
  x.score = {};
  if (p.mask_kind != kNoMask) {
    x.score.mask = arena.take<T>(W * kForwardKeys);
    x.score.mask_tmp = arena.take<T>(W * kForwardKeys);
  }
  return x;
}

// The keys of one tile for some of its queries: scores, softmax, and their part of the output.
template <class S>
void forward_panel(const AttentionParams& p, ForwardScratch<S>& x, const KeyRange& keys,
                   const KeyRows<operand_t<S>>& k, const KeyRows<operand_t<S>>& v) {
  using T = compute_t<S>;
  using Mul = typename Operand<S>::Mul;
  constexpr int64_t kPair = Operand<S>::kPair;
  constexpr int kVecs = kPanel / kLanes<T> % 4 ? 3 : 4;  // a whole panel without a rest
  constexpr int64_t kStep = kVecs * kLanes<T>;
  const int64_t ld = x.rows.width, begin = keys.begin, lanes = keys.end - keys.begin;
  const T factor = score_unit<T>(p) * kLog<S>;

  matmul<Mul, kRowMajor, kOverwrite>(keys.n, lanes, ceil_div(p.D, kPair), k.data, k.ld, x.q + begin, ld,
                                     x.scores + begin, ld);
  finish_scores<T, S, false>(p, x.rows, keys, x.scores, x.score);

  mask_t<Vec<T>> changed{};
  int64_t r = begin;
  for (; r + kStep <= keys.end; r += kStep)
    changed |= softmax_columns<S, kVecs>(keys.n, ld, factor, x.scores + r, x.keep ? x.keep + r : nullptr,
                                         x.m + r, x.l + r, x.alpha + r, x.weights + r);
  for (; r < keys.end; r += kLanes<T>)
    changed |= softmax_columns<S, 1>(keys.n, ld, factor, x.scores + r, x.keep ? x.keep + r : nullptr,
                                     x.m + r, x.l + r, x.alpha + r, x.weights + r);
  if (any(changed))
    for (int64_t d = 0; d < p.Dv; ++d)
      for (r = begin; r < keys.end; r += kLanes<T>)
        store(x.out + d * ld + r, load(x.out + d * ld + r) * load(x.alpha + r));

  matmul<Mul, kColMajor, kAccumulate>(p.Dv, lanes, ceil_div(keys.n, kPair), v.data, v.ld,
                                      x.weights + begin, ld, x.out + begin, ld);
}

template <class S>
void forward_tile(const AttentionParams& p, ForwardScratch<S>& x, const KeyRange& keys,
                  const KeySource<S>& key, const KeySource<S>& value) {
  const auto k = rows_along_columns(key, keys.j0, keys.n, x.k);
  const auto v = rows_along_rows(value, keys.j0, keys.n, x.v);
  if (x.keep) dropout_tile(p, x.rows, keys, x.keep);
  KeyRange panel = keys;
  for (; panel.begin < keys.end; panel.begin = panel.end) {
    panel.end = least(panel.begin + kPanel, keys.end);
    forward_panel(p, x, panel, k, v);
  }
}

template <class S> void forward_block(const AttentionParams& p, const AttentionItem& item) {
  using T = compute_t<S>;
  ForwardScratch<S> x = forward_scratch<S>(p, item);
  const RowBlock<T>& rows = x.rows;
  const AttentionSequence& seq = *rows.seq;
  const int64_t ld = rows.width;
  pack_queries<S>(rows, static_cast<const S*>(p.q) + seq.q, p.qs, p.D, x.q, x.tmp);
  __builtin_memset(x.out, 0, size_t(ld * p.Dv) * sizeof(T));
  for (int64_t r = 0; r < ld; ++r) {
    x.m[r] = -T(__builtin_inf());
    x.l[r] = T(0);
  }

  int64_t begin = keys_begin(rows), end = keys_end(rows);
  if (item.split >= 0) {
    begin = greatest(begin, item.split * seq.split_keys);
    end = least(end, (item.split + 1) * seq.split_keys);
  }
  const KeySource<S> key = key_source<S>(p, seq, rows.hkv), value = value_source<S>(p, seq, rows.hkv);
  for (int64_t j = begin; j < end;) {
    KeyRange keys = key_range(rows, j, least(kForwardKeys, end - j));
    // Of a tile on the diagonal half is hidden, of two halves a quarter.
    for (int64_t n = kForwardKeys / 2; n >= 32 && !keys.inside; n /= 2) keys = key_range(rows, j, least(n, end - j));
    if (keys.begin < keys.end) forward_tile(p, x, keys, key, value);
    j += keys.n;
  }

  const RowSink<S> to{p, item, rows};
  const T unit = score_unit<T>(p);
  for (int64_t r = 0; r < rows.n; ++r) {
    const Normaliser<T> norm = normalise(x.m[r] * unit, x.l[r], to.sink(r));
    x.alpha[r] = norm.scale;
    to.put_lse(r, norm.lse);
  }
  T* const turned = reinterpret_cast<T*>(x.tmp);
  static_assert(sizeof(operand_t<S>) == sizeof(T));
  transpose(p.Dv, rows.n, x.out, ld, turned, p.Dv);
  for (int64_t r = 0; r < rows.n; ++r) {
    T* const o = turned + r * p.Dv;
    for (int64_t d = 0; d < p.Dv; ++d) o[d] *= x.alpha[r];
    to.put_row(r, o);
  }
}

// ---- few queries ----

// dots[x] = q . (row x of K) for one vector's worth of keys.
template <class S>
FASTLM_INLINE void dot_rows(const compute_t<S>* q, const S* const* rows, int64_t D, compute_t<S>* dots) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kL];
#pragma GCC unroll 16
  for (int x = 0; x < kL; ++x) sum[x] = Vec<T>{};
  int64_t d = 0;
  for (; d + kL <= D; d += kL) {
    const Vec<T> qd = load(q + d);
#pragma GCC unroll 16
    for (int x = 0; x < kL; ++x) sum[x] = fma(load<T>(rows[x] + d), qd, sum[x]);
  }
  if (d < D) {
    const Vec<T> qd = load(q + d, D - d);
#pragma GCC unroll 16
    for (int x = 0; x < kL; ++x) sum[x] = fma(load<T>(rows[x] + d, D - d), qd, sum[x]);
  }
  reduce_add_each(sum, dots);
}

// o[d] += sum_j w[j] * (row j of V)[d], over kV vectors at a time.
template <class S, int kV>
FASTLM_INLINE void add_rows(const compute_t<S>* w, const S* const* rows, int64_t n, int64_t at, compute_t<S>* o) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kV];
#pragma GCC unroll 8
  for (int v = 0; v < kV; ++v) sum[v] = load(o + at + v * kL);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> wj = splat(w[j]);
#pragma GCC unroll 8
    for (int v = 0; v < kV; ++v) sum[v] = fma(wj, load<T>(rows[j] + at + v * kL), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kV; ++v) store(o + at + v * kL, sum[v]);
}

template <class S>
FASTLM_INLINE void add_weighted_rows(const compute_t<S>* w, const S* const* rows, int64_t n, int64_t D,
                                     compute_t<S>* o) {
  using T = compute_t<S>;
  constexpr int kL = kLanes<T>;
  int64_t d = 0;
  for (; d + 8 * kL <= D; d += 8 * kL) add_rows<S, 8>(w, rows, n, d, o);
  for (; d + 4 * kL <= D; d += 4 * kL) add_rows<S, 4>(w, rows, n, d, o);
  for (; d + 2 * kL <= D; d += 2 * kL) add_rows<S, 2>(w, rows, n, d, o);
  for (; d + kL <= D; d += kL) add_rows<S, 1>(w, rows, n, d, o);
  if (d < D) {
    Vec<T> sum = load(o + d, D - d);
    for (int64_t j = 0; j < n; ++j) sum = fma(splat(w[j]), load<T>(rows[j] + d, D - d), sum);
    store(o + d, sum, D - d);
  }
}

// finish_scores for one row with keys along lanes: s[j], n of them, -inf behind up to a whole vector.
template <class S>
void finish_row_scores(const AttentionParams& p, const RowBlock<compute_t<S>>& rows, int64_t r, int64_t j0,
                       int64_t n, compute_t<S>* s, compute_t<S>* mask) {
  using T = compute_t<S>;
  using V = Vec<T>;
  const int64_t i = rows.i(r), far = int64_t(1) << 20;
  if (has_transform(p)) {
    if (rows.mask) mask_row<T, S>(p, rows.mask[r], j0, n, mask);
    const V shift = splat(T(i + rows.seq->Tk - rows.seq->Tq - j0)) - iota<T>();
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      V x = load(s + j) * splat(T(p.scale));
      if (p.softcap > 0) x = tanh(x * splat(T(1 / p.softcap))) * splat(T(p.softcap));
      if (rows.slope) x -= splat(rows.slope[r]) * abs(shift - splat(T(j)));
      if (rows.mask) x += load(mask + j);
      store(s + j, x);
    }
  }
  const V low = splat(T(greatest(-far, least(far, i - rows.seq->lower - j0))));
  const V high = splat(T(greatest(-far, least(far, least(i + rows.seq->upper - j0, n - 1)))));
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const V at = iota<T>() + splat(T(j));
    store(s + j, select((at >= low) & (at <= high), load(s + j), splat(-T(__builtin_inf()))));
  }
}

// Whether every row sees all keys from begin to end alike.
template <class T> bool any_order(const RowBlock<T>& rows, int64_t begin, int64_t end) {
  if (rows.mask || rows.slope) return false;
  for (int64_t r = 0; r < rows.n; ++r)
    if (rows.i(r) - rows.seq->lower > begin || rows.i(r) + rows.seq->upper < end - 1) return false;
  return true;
}

// Asks for n rows that are next in turn, into the second-level cache, which waits for more lines of memory at the same
// time than the first.
template <class S> FASTLM_INLINE void fetch_rows(const S* const* rows, int64_t n, int64_t D) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < D; d += 64 / int64_t(sizeof(S))) __builtin_prefetch(rows[j] + d, 0, 2);
}

template <class S> void forward_few(const AttentionParams& p, const AttentionItem& item) {
  using T = compute_t<S>;
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  const int64_t numbers = kFewRows * (p.D + p.Dv + 64) + 4096;
  Arena arena{static_cast<char*>(thread_scratch(kScratchKernel, size_t(numbers) * sizeof(T)))};
  const RowBlock<T> rows = row_block<T>(p, item, arena);
  const AttentionSequence& seq = *rows.seq;
  T* const q = arena.take<T>(rows.n * p.D);
  T* const out = arena.take<T>(rows.n * p.Dv);
  T* const s = arena.take<T>(kKeyBlock);
  T* const mask = arena.take<T>(kKeyBlock);
  T m[kFewRows], l[kFewRows];
  gather_rows(rows, static_cast<const S*>(p.q) + seq.q, p.qs, p.D, rows.n, q, p.D);
  __builtin_memset(out, 0, size_t(rows.n * p.Dv) * sizeof(T));
  for (int64_t r = 0; r < rows.n; ++r) {
    m[r] = -T(__builtin_inf());
    l[r] = T(0);
  }

  int64_t begin = keys_begin(rows), end = keys_end(rows);
  if (item.split >= 0) {
    begin = greatest(begin, item.split * seq.split_keys);
    end = least(end, (item.split + 1) * seq.split_keys);
  }
  const KeySource<S> key = key_source<S>(p, seq, rows.hkv), value = value_source<S>(p, seq, rows.hkv);
  const T unit = score_unit<T>(p), factor = unit * kLog<S>;
  // Where nothing depends on a key's place, the keys of four parts take turns: a core reads several distant
  // places of memory at the same time sooner than one (see few_tokens.h).
  const int64_t part = any_order(rows, begin, end) ? (end - begin) / 4 : 0;
  const auto place = [&](int64_t x) { return begin + (x < 4 * part ? x % 4 * part + x / 4 : x); };
  // The rows of a block of K or V, in whole vectors: behind the end the last one again.
  struct Block { const S* row[kKeyBlock]; };
  const auto block = [&](const KeySource<S>& from, int64_t j0) {
    Block x;
    const int64_t n = least(kKeyBlock, round_up<int64_t>(end - j0, kL));
    for (int64_t j = 0; j < n; ++j) x.row[j] = from.row(place(least(j0 + j, end - 1) - begin));
    return x;
  };
  Block k = block(key, begin);
  for (int64_t j0 = begin; j0 < end; j0 += kKeyBlock) {
    const int64_t n = least(kKeyBlock, end - j0);
    const Block v = block(value, j0), next = block(key, j0 + kKeyBlock);
    for (int64_t r = 0; r < rows.n; ++r) {
      T* const o = out + r * p.Dv;
      for (int64_t j = 0; j < n; j += kL) {
        if (r == 0) fetch_rows(v.row + j, kL, p.Dv);
        dot_rows<S>(q + r * p.D, k.row + j, p.D, s + j);
      }
      finish_row_scores<S>(p, rows, r, j0, n, s, mask);
      V top = load(s), sum{};
      for (int64_t j = kL; j < n; j += kL) top = max(top, load(s + j));
      const T old = m[r], peak = reduce_max(top);
      m[r] = peak > old ? peak : old;
      const T shift = m[r] == -T(__builtin_inf()) ? T(0) : m[r];
      for (int64_t j = 0; j < n; j += kL) {
        const V w = softmax_exp<S>((load(s + j) - splat(shift)) * splat(factor));
        sum += w;
        store(s + j, w);
      }
      const T alpha = exp_scalar((old - shift) * unit);
      l[r] = l[r] * alpha + reduce_add(sum);
      for (int64_t d = 0; d < p.Dv; ++d) o[d] *= alpha;
      for (int64_t j = 0; j < n; j += kL) {
        if (r == 0 && j0 + kKeyBlock + j < end) fetch_rows(next.row + j, kL, p.D);
        add_weighted_rows<S>(s + j, v.row + j, least<int64_t>(kL, n - j), p.Dv, o);
      }
    }
    k = next;
  }

  const RowSink<S> to{p, item, rows};
  for (int64_t r = 0; r < rows.n; ++r) {
    const Normaliser<T> norm = normalise(m[r] * unit, l[r], to.sink(r));
    for (int64_t d = 0; d < p.Dv; ++d) out[r * p.Dv + d] *= norm.scale;
    to.put_lse(r, norm.lse);
    to.put_row(r, out + r * p.Dv);
  }
}

// ---- splits ----

// O = sum_s exp(lse_s - lse) O_s, in the order of the splits.
template <class S> void combine_splits(const AttentionParams& p, const AttentionItem& split) {
  using T = compute_t<S>;
  AttentionItem item = split;
  item.split = -1;
  const int64_t numbers = 3 * kRowBlock + p.Dv + 1024;
  Arena arena{static_cast<char*>(thread_scratch(kScratchKernel, size_t(numbers) * sizeof(double)))};
  const RowBlock<T> rows = row_block<T>(p, item, arena);
  T* const o = arena.take<T>(p.Dv);
  const AttentionSequence& seq = *rows.seq;
  const RowSink<S> to{p, item, rows};
  for (int64_t r = 0; r < rows.n; ++r) {
    const int64_t stride = rows.group * seq.Tq;
    const int64_t first = seq.partial + rows.hkv * seq.splits * stride + rows.row + r;
    const T* lse = static_cast<const T*>(p.partial_lse) + first;
    const T* part = static_cast<const T*>(p.partial_out) + first * p.Dv;
    T top = -T(__builtin_inf()), sum = 0;
    for (int64_t s = 0; s < seq.splits; ++s) top = lse[s * stride] > top ? lse[s * stride] : top;
    const T shift = top == -T(__builtin_inf()) ? T(0) : top;
    for (int64_t d = 0; d < p.Dv; ++d) o[d] = 0;
    for (int64_t s = 0; s < seq.splits; ++s) {
      const T w = exp_scalar(lse[s * stride] - shift);
      sum += w;
      for (int64_t d = 0; d < p.Dv; ++d) o[d] += w * part[s * stride * p.Dv + d];
    }
    const Normaliser<T> norm = normalise(top, sum, to.sink(r));
    for (int64_t d = 0; d < p.Dv; ++d) o[d] *= norm.scale;
    to.put_lse(r, norm.lse);
    to.put_row(r, o);
  }
}

template <class S> void attention_forward(const AttentionParams& p) {
  parallel_items(p.pool, p.n_items, [&](int64_t n) {
    const AttentionItem& item = p.items[n];
    if (item.rows <= kFewRows && !p.dropout) forward_few<S>(p, item);
    else forward_block<S>(p, item);
  });
  if (!p.partial_out) return;
  parallel_items(p.pool, p.n_items, [&](int64_t n) {
    if (p.items[n].split == 0) combine_splits<S>(p, p.items[n]);
  });
}

}  // namespace fastlm::FASTLM_ISA
