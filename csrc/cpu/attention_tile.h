// What attention's forward and backward share: a block of queries and its tiles of scores.
// Included by attention.h's users only; see there for the letters and the layout.
#pragma once
#include "attention.h"
#include "gemm.h"

namespace fastlm::FASTLM_ISA {

// How products read storage type S: as compute type, or bf16 in pairs along the summed dimension.
template <class S, bool kPaired> struct OperandOf {
  using Mul = Float<compute_t<S>>;
  static constexpr int64_t kPair = 1;
};
template <> struct OperandOf<bf16, true> {
  using Mul = Bf16Pair;
  static constexpr int64_t kPair = 2;
};
template <class S> using Operand = OperandOf<S, kHasBf16Dot>;
template <class S> using operand_t = typename Operand<S>::Mul::elem;

// A piece of scratch handed out front to back, each part aligned to a cache line.
struct Arena {
  char* at;
  template <class X> X* take(int64_t n) {
    X* p = reinterpret_cast<X*>(at);
    at += round_up<int64_t>(n * int64_t(sizeof(X)), 64);
    return p;
  }
};

// ---- the exponential of the softmax ----

// Where weights are rounded to 16 bits, or what is summed with them is, exponentials within 2^-19 will do.
template <class S> inline constexpr bool kRoughWeights = sizeof(S) < sizeof(compute_t<S>);

// Softmax takes powers of 2 for float and of e otherwise: kLog turns natural logarithms into these units.
template <class S> inline constexpr compute_t<S> kLog = 1;
template <> inline constexpr float kLog<float> = 1.44269504f;

// 2^x for x <= 0 (or a rounding error above): Cephes' exp2f without its range checks. 0 for x below
// the exponents of normal numbers and for -inf, NaN for NaN.
FASTLM_INLINE Vec<float> exp2_negative(Vec<float> x) {
  using V = Vec<float>;
  x = max(splat(-127.f), x);                      // NaN, the second operand, comes through
  const V biased = x + splat(12582912.f + 127.f);  // 1.5 * 2^23: the low bits hold n + 127
  const V f = x - (biased - splat(12582912.f + 127.f));
  V y = splat(1.535336188319500e-4f);
  y = fma(y, f, splat(1.339887440266574e-3f));
  y = fma(y, f, splat(9.618437357674640e-3f));
  y = fma(y, f, splat(5.550332471162809e-2f));
  y = fma(y, f, splat(2.402264791363012e-1f));
  y = fma(y, f, splat(6.931472028550421e-1f));
  y = fma(y, f, splat(1.f));
  return y * bits_of<V>(bits_of<Words>(biased) << 23);
}
template <class S> FASTLM_INLINE Vec<compute_t<S>> softmax_exp(Vec<compute_t<S>> x) {
  if constexpr (kRoughWeights<S>) return exp_negative<true>(x);
  else if constexpr (sizeof(S) == 4) return exp2_negative(x);
  else return exp(x);
}
// exp(x) of a scalar in natural units, x <= 0.
template <class T> FASTLM_INLINE T exp_scalar(T x) { return softmax_exp<T>(splat(x * kLog<T>))[0]; }

// ---- a block of queries ----

// Lane r of every tile is row `row + r` of the item: query i(r) of head h(r).
template <class T> struct RowBlock {
  const AttentionSequence* seq;
  int64_t b, hkv, row, n, group;
  int64_t width;        // n rounded up to whole vectors; lanes behind n hold zeros
  int64_t first, last;  // least and greatest query index
  int64_t head;         // of lane 0
  bool one_head;        // then lane r is query first + r
  T* index;             // [width] i(r) - first
  T* slope;             // [width] ALiBi slope of h(r); null without ALiBi
  int64_t* mask;        // [n] offset of the mask's row; null without mask

  int64_t i(int64_t r) const { return one_head ? first + r : (row + r) % seq->Tq; }
  int64_t h(int64_t r) const { return one_head ? head : hkv * group + (row + r) / seq->Tq; }
};

template <class T>
RowBlock<T> row_block(const AttentionParams& p, const AttentionItem& item, Arena& arena) {
  RowBlock<T> rows;
  rows.seq = &p.sequences[item.b];
  rows.b = item.b;
  rows.hkv = item.hkv;
  rows.row = item.row;
  rows.n = item.rows;
  rows.group = p.Hq / p.Hkv;
  rows.width = round_up<int64_t>(item.rows, kLanes<float>);
  const int64_t Tq = rows.seq->Tq;
  rows.head = item.hkv * rows.group + item.row / Tq;
  rows.one_head = item.row / Tq == (item.row + item.rows - 1) / Tq;
  rows.first = rows.one_head ? item.row % Tq : 0;
  rows.last = rows.one_head ? rows.first + item.rows - 1 : Tq - 1;
  rows.index = arena.take<T>(rows.width);
  rows.slope = p.slopes ? arena.take<T>(rows.width) : nullptr;
  rows.mask = p.mask_kind != kNoMask ? arena.take<int64_t>(rows.width) : nullptr;
  for (int64_t r = 0; r < rows.width; ++r) {
    const int64_t lane = least(r, rows.n - 1), i = rows.i(lane), h = rows.h(lane);
    rows.index[r] = T(i - rows.first);
    if (p.slopes) rows.slope[r] = static_cast<const T*>(p.slopes)[item.b * p.Hq + h];
    if (rows.mask) rows.mask[r] = item.b * p.mask_b + h * p.mask_h + i * p.mask_q;
  }
  return rows;
}

// Offset of lane r's row in a tensor of the given strides.
template <class T>
FASTLM_INLINE int64_t row_offset(const RowBlock<T>& rows, AttentionStrides s, int64_t r) {
  return rows.h(r) * s.h + rows.i(r) * s.t;
}

// ---- packing ----

// dst[d][lane] = row of each lane, as operand (d counts pairs where these are paired). `tmp` holds
// n x D elements.
template <class S, class T>
void pack_queries(const RowBlock<T>& rows, const S* src, AttentionStrides s, int64_t D,
                  operand_t<S>* dst, operand_t<S>* tmp) {
  using E = operand_t<S>;
  constexpr int64_t kPair = Operand<S>::kPair;
  const int64_t K = ceil_div(D, kPair), ld = rows.width;
  if (rows.n < ld)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t r = rows.n; r < ld; ++r) dst[k * ld + r] = E(0);
  if (rows.one_head) return pack_columns(rows.n, D, src + row_offset(rows, s, 0), s.t, dst, ld, tmp);
  for (int64_t r = 0; r < rows.n; ++r) Pack<E>::along(D, src + row_offset(rows, s, r), 1, tmp + r * K);
  transpose(rows.n, K, tmp, K, dst, ld);
}

// Rows of each lane in the compute type, row by row: dst[r][D]; zeros behind n up to `padded`.
template <class S, class T>
void gather_rows(const RowBlock<T>& rows, const S* src, AttentionStrides s, int64_t D,
                 int64_t padded, T* dst, int64_t ld) {
  for (int64_t r = 0; r < rows.n; ++r) {
    convert_row(D, src + row_offset(rows, s, r), 1, dst + r * ld);
    for (int64_t d = D; d < ld; ++d) dst[r * ld + d] = T(0);
  }
  for (int64_t r = rows.n; r < padded; ++r) __builtin_memset(dst + r * ld, 0, size_t(ld) * sizeof(T));
}

// A block of rows of K or V, as the left operand of a product.
template <class E> struct KeyRows {
  const E* data;
  int64_t ld;
};

// Where row j of K or V (of D columns, head hkv) begins.
template <class S> struct KeySource {
  const S* base;  // row 0 of the sequence; of page 0 where keys are paged
  int64_t t, D;
  const int32_t* pages;
  int64_t page_size, page_stride;
  FASTLM_INLINE const S* row(int64_t j) const {
    if (!pages) return base + j * t;
    return base + pages[j / page_size] * page_stride + (j % page_size) * t;
  }
};

template <class S>
KeySource<S> key_source(const AttentionParams& p, const AttentionSequence& seq, int64_t hkv) {
  return {static_cast<const S*>(p.k) + seq.k + hkv * p.ks.h, p.ks.t, p.D, seq.pages, p.page_size, p.k_page};
}
template <class S>
KeySource<S> value_source(const AttentionParams& p, const AttentionSequence& seq, int64_t hkv) {
  return {static_cast<const S*>(p.v) + seq.v + hkv * p.vs.h, p.vs.t, p.Dv, seq.pages, p.page_size, p.v_page};
}

// Leading dimension of rows of D elements in scratch: an odd number of 64-byte lines for 4-byte
// elements, so that a column of a block spreads over all sets of the first-level cache. At strides of
// 256 or 512 bytes, which heads of 64 and 128 have, a block's column would evict itself.
FASTLM_INLINE constexpr int64_t spread(int64_t D) { return (D + 15) / 16 * 16 + ((D + 15) / 16 % 2 ? 0 : 16); }

// Rows j0 .. j0 + n, summed over columns: in place where the type allows it, else into scratch.
template <class S>
KeyRows<operand_t<S>> rows_along_columns(const KeySource<S>& src, int64_t j0, int64_t n, operand_t<S>* scratch) {
  using E = operand_t<S>;
  if constexpr (sizeof(S) == sizeof(E)) {
    if (!src.pages) return {src.row(j0), src.t};
  }
  if constexpr (Operand<S>::kPair == 2) {
    if (!src.pages && src.t % 2 == 0 && src.D % 2 == 0)
      return {reinterpret_cast<const E*>(src.row(j0)), src.t / 2};
  }
  const int64_t ld = spread(ceil_div(src.D, Operand<S>::kPair));
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (Operand<S>::kPair == 2) Pack<E>::along(src.D, src.row(j0 + j), 1, scratch + j * ld);
    else convert_row(src.D, src.row(j0 + j), 1, scratch + j * ld);
  }
  return {scratch, ld};
}

// Rows j0 .. j0 + n, summed over rows: in place where a column of a block spreads over the sets of the first-level
// cache, else in scratch. Pairs are of two rows.
template <class S>
KeyRows<operand_t<S>> rows_along_rows(const KeySource<S>& src, int64_t j0, int64_t n, operand_t<S>* scratch) {
  if constexpr (sizeof(S) == sizeof(operand_t<S>)) {
    if (!src.pages && src.t * int64_t(sizeof(S)) % 1024 != 0) return {src.row(j0), src.t};
  }
  constexpr int64_t kPair = Operand<S>::kPair;
  const int64_t ld = spread(src.D);
  for (int64_t j = 0; j < n; j += kPair)
    Pack<operand_t<S>>::across(src.D, src.row(j0 + j), 1, j + 1 < n ? src.row(j0 + j + 1) : nullptr,
                               scratch + j / kPair * ld);
  return {scratch, ld};
}

// ---- scores ----

// A tile of scores, [keys j0 .. j0 + n][lanes begin .. end of the block].
struct KeyRange {
  int64_t j0, n;
  int64_t begin, end;  // lanes that see any of these keys, whole vectors
  bool inside;         // every one of them sees all of these keys
};

template <class T> KeyRange key_range(const RowBlock<T>& rows, int64_t j0, int64_t n) {
  const AttentionSequence& s = *rows.seq;
  KeyRange keys = {j0, n, 0, rows.width, false};
  keys.inside = j0 >= rows.last - s.lower && j0 + n - 1 <= rows.first + s.upper;
  if (rows.one_head && !keys.inside) {
    const int64_t from = greatest<int64_t>(j0 - s.upper - rows.first, 0);
    const int64_t to = least(j0 + n + s.lower - rows.first, rows.n);
    keys.begin = from / kLanes<T> * kLanes<T>;
    keys.end = least(round_up<int64_t>(to, kLanes<T>), rows.width);
  }
  return keys;
}

// Keys that any row of the block sees: [begin, end). Begins at a multiple of 4, as dropout needs.
template <class T> FASTLM_INLINE int64_t keys_begin(const RowBlock<T>& rows) {
  return greatest<int64_t>(rows.first - rows.seq->lower, 0) / 4 * 4;
}
template <class T> FASTLM_INLINE int64_t keys_end(const RowBlock<T>& rows) {
  return least(rows.seq->Tk, greatest<int64_t>(rows.last + rows.seq->upper + 1, 0));
}

// Whether scores must be brought to natural units before the softmax, not just multiplied by scale.
FASTLM_INLINE bool has_transform(const AttentionParams& p) {
  return p.softcap > 0 || p.slopes || p.mask_kind != kNoMask || !(p.scale > 0);
}
// What a tile's scores are multiplied by to be in natural units.
template <class T> FASTLM_INLINE T score_unit(const AttentionParams& p) {
  return has_transform(p) ? T(1) : T(p.scale);
}

// A row of the mask as numbers to add: dst[j] of the keys j0 .. j0 + n.
template <class T, class S>
void mask_row(const AttentionParams& p, int64_t offset, int64_t j0, int64_t n, T* dst) {
  offset += j0 * p.mask_k;
  switch (p.mask_kind) {
    case kBoolMask: {
      const uint8_t* m = static_cast<const uint8_t*>(p.mask) + offset;
      for (int64_t j = 0; j < n; ++j) dst[j] = m[j * p.mask_k] ? T(0) : -T(__builtin_inf());
      return;
    }
    case kSameMask: return convert_row(n, static_cast<const S*>(p.mask) + offset, p.mask_k, dst);
    case kFloatMask: {
      const float* m = static_cast<const float*>(p.mask) + offset;
      for (int64_t j = 0; j < n; ++j) dst[j] = T(m[j * p.mask_k]);
      return;
    }
    case kNoMask: __builtin_unreachable();
  }
}

// The mask's tile as numbers to add, [keys][ld]. `tmp` holds rows.n x keys.n elements.
template <class T, class S>
void mask_tile(const AttentionParams& p, const RowBlock<T>& rows, const KeyRange& keys, T* dst, T* tmp) {
  const int64_t ld = rows.width;
  if (p.mask_q == 0 && (rows.one_head || p.mask_h == 0)) {  // one row for all lanes
    mask_row<T, S>(p, rows.mask[0], keys.j0, keys.n, tmp);
    for (int64_t j = 0; j < keys.n; ++j)
      for (int64_t r = keys.begin; r < keys.end; r += kLanes<T>) store(dst + j * ld + r, splat(tmp[j]));
    return;
  }
  const int64_t end = least(keys.end, rows.n);
  for (int64_t r = keys.begin; r < end; ++r)
    mask_row<T, S>(p, rows.mask[r], keys.j0, keys.n, tmp + (r - keys.begin) * keys.n);
  transpose(end - keys.begin, keys.n, tmp, keys.n, dst + keys.begin, ld);
  for (int64_t j = 0; j < keys.n; ++j)
    for (int64_t r = end; r < keys.end; ++r) dst[j * ld + r] = T(0);
}

// Space for a block's mask tile and softcap slopes, where they are needed.
template <class T> struct ScoreScratch {
  T *mask, *mask_tmp;  // [keys][width], [rows.n][keys]
  T* slope;            // [keys][width] d softcap(s) / ds, for the backward
};

// Brings raw products q.k to scores, in place: softcap, biases, band.
template <class T, class S, bool kKeepSlope>
void finish_scores(const AttentionParams& p, const RowBlock<T>& rows, const KeyRange& keys, T* s,
                   const ScoreScratch<T>& scratch) {
  using V = Vec<T>;
  constexpr int kL = kLanes<T>;
  const int64_t ld = rows.width, n = keys.n;
  if (has_transform(p)) {
    if (rows.mask) mask_tile<T, S>(p, rows, keys, scratch.mask, scratch.mask_tmp);
    const V scale = splat(T(p.scale)), cap = splat(T(p.softcap)), inner = splat(T(p.scale / p.softcap));
    for (int64_t j = 0; j < n; ++j) {
      // i + Tk - Tq - j, counted from the block's first query
      const V shift = splat(T(rows.first + rows.seq->Tk - rows.seq->Tq - (keys.j0 + j)));
      for (int64_t r = keys.begin; r < keys.end; r += kL) {
        V x = load(s + j * ld + r);
        if (p.softcap > 0) {
          const V t = tanh(x * inner);
          if constexpr (kKeepSlope) store(scratch.slope + j * ld + r, splat(T(1)) - t * t);
          x = t * cap;
        } else {
          x = x * scale;
        }
        if (rows.slope) x -= load(rows.slope + r) * abs(load(rows.index + r) + shift);
        if (rows.mask) x += load(scratch.mask + j * ld + r);
        store(s + j * ld + r, x);
      }
    }
  }
  if (keys.inside) return;
  const V hidden = splat(-T(__builtin_inf()));
  for (int64_t j = 0; j < n; ++j) {
    // Bounds on i - first, clamped to what T holds exactly; |i - first| is far below.
    const int64_t at = keys.j0 + j - rows.first, far = int64_t(1) << 20;
    const V low = splat(T(greatest(-far, least(far, at - rows.seq->upper))));
    const V high = splat(T(greatest(-far, least(far, at + rows.seq->lower))));
    for (int64_t r = keys.begin; r < keys.end; r += kL) {
      const V i = load(rows.index + r);
      const V x = load(s + j * ld + r);
      store(s + j * ld + r, select((i >= low) & (i <= high), x, hidden));
    }
  }
}

// ---- dropout ----

FASTLM_INLINE void multiply_words(Words a, uint32_t b, Words& high, Words& low) {
  low = a * b;
#if defined(__AVX512F__)
  const __m512i x = __m512i(a), y = _mm512_set1_epi32(int(b));
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(x, y), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  high = Words(_mm512_mask_blend_epi32(0xaaaa, even, odd));
#elif defined(__AVX2__)
  const __m256i x = __m256i(a), y = _mm256_set1_epi32(int(b));
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, y), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  high = Words(_mm256_blend_epi32(even, odd, 0xaa));
#else
  for (int i = 0; i < kLanes<uint32_t>; ++i) high[i] = uint32_t((uint64_t(a[i]) * b) >> 32);
#endif
}

// Philox-4x32-10 (Salmon et al., SC 2011), a counter per lane.
FASTLM_INLINE void philox(Words (&c)[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply_words(c[0], 0xD2511F53u, high0, low0);
    multiply_words(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// keep[key][ld]: keep_scale where dropout keeps the weight, else 0. Counter of key j, query i:
// (j / 4, i, b * Hq + h, 0), word j % 4. keys.j0 is a multiple of 4.
template <class T>
void dropout_tile(const AttentionParams& p, const RowBlock<T>& rows, const KeyRange& keys, T* keep) {
  constexpr int kW = kLanes<uint32_t>;
  const T kept = T(p.keep_scale);
  for (int64_t r = keys.begin / kW * kW; r < keys.end; r += kW) {
    Words query, head;
    for (int x = 0; x < kW; ++x) {
      const int64_t lane = least(r + x, rows.n - 1);
      query[x] = uint32_t(rows.i(lane));
      head[x] = uint32_t(rows.b * p.Hq + rows.h(lane));
    }
    for (int64_t j = 0; j < keys.n; j += 4) {
      Words c[4] = {splat(uint32_t((keys.j0 + j) / 4)), query, head, Words{}};
      philox(c, p.seed);
      for (int64_t x = 0; x < 4 && j + x < keys.n; ++x)
        for (int lane = 0; lane < kW; ++lane)
          keep[(j + x) * rows.width + r + lane] = c[x][lane] < p.drop_below ? T(0) : kept;
    }
  }
}

}  // namespace fastlm::FASTLM_ISA
