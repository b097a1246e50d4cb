// Attention on a GPU: what forward and backward share.
//
//   S = softcap(scale Q K^T) + bias,  P = softmax(S),  O = dropout(P) V
//
// Q, K, V and O are (B, H, T, D) by strides, the last dimension contiguous and every row at 16 bytes; or
// packed (T, H, D), sequence b holding the rows cu[b] up to cu[b + 1]; or K and V are pages of a pool.
// Hq = group Hkv query heads share Hkv heads of keys and values: the rows of one key head are
// r = i group + g, query i of its head g, and a block of rows reads K and V once for all of them.
//
// Logits are in base 2 inside of the kernels: exp2 is an instruction, exp is not.
//
// Letters: B batch, H heads, T length, D size of a head of Q and K, Dv of V; b a sequence, i a query, j a
// key, r a row; Tq and Tk in a Sequence are its own lengths.
#pragma once
#include "../cpu/attention.h"
#include "product.cuh"

namespace fastlm::cuda {

struct HeadStrides { int64_t b, h, t; };  // b is 0 where packed; of pages, b is the stride of a page

struct AttentionParams {
  int B, Hq, Hkv, group, Tq, Tk;  // the lengths: of every sequence, or the most of any
  int D, Dv;                      // multiples of 16 bytes; what pads them is 0
  const void *q, *k, *v;
  HeadStrides qs, ks, vs, os;
  const int32_t *cu_q, *cu_k;     // [B + 1] where packed, else null; cu_k null with pages
  const int32_t* used;            // [B] keys in use, or null
  const int32_t* table;           // [B][table_b] pages, or null
  int page_size, table_b;
  bool causal;
  int left, right;                // window, -1: open
  float scale, softcap;           // softcap 0: none
  MaskKind mask_kind;
  const void* mask;
  int64_t mask_b, mask_h, mask_q, mask_k;  // strides; 0 where broadcast
  const float* slopes;            // [B][Hq] or null
  const float* sinks;             // [Hq] or null
  bool dropout;
  uint32_t drop_below;            // a weight is dropped if its random word is below
  float keep_scale;               // 1 / (1 - p); 0 for p = 1
  uint64_t seed;
  void* out;
  float* lse;                     // base e; -inf for a row that sees no key
  int64_t lse_b, lse_h;           // strides; rows are contiguous
};

// Which part of which key head a block of threads has. Blocks start in the order of their numbers: heads take turns,
// as many as the second-level cache holds what their blocks read of, so that the first parts, which have the most work
// where attention is causal, start first (12 heads of 4096 in bfloat16 on an H100: 70 % of the time head by head).
struct Turn { int part, hkv, b; };
inline constexpr int64_t kCachedBytes = 16 << 20;

inline int heads_together(const AttentionParams& p, int64_t rows, size_t element) {
  const int64_t fit = kCachedBytes / (rows * (p.D + p.Dv) * int64_t(element) + 1), heads = int64_t(p.B) * p.Hkv;
  return int(fit < 1 ? 1 : fit > heads ? heads : fit);
}

FASTLM_DEVICE Turn turn_of(const AttentionParams& p, uint32_t x, int parts, int together) {
  const uint32_t heads = uint32_t(p.B) * p.Hkv, first = x / (uint32_t(parts) * together) * together;
  const uint32_t group = min(uint32_t(together), heads - first);
  x -= first * parts;
  const uint32_t head = first + x % group;
  return {int(x / group), int(head % p.Hkv), int(head / p.Hkv)};
}

// A sequence's rows and band: query i sees the keys i - lower <= j <= i + upper.
struct Sequence {
  int q0, k0;  // first rows where packed
  int Tq, Tk, lower, upper;
};
inline constexpr int kUnbounded = 1 << 30;

FASTLM_DEVICE Sequence sequence_of(const AttentionParams& p, int b) {
  Sequence s{0, 0, p.Tq, p.Tk, kUnbounded, kUnbounded};
  if (p.cu_q) {
    s.q0 = p.cu_q[b];
    s.Tq = p.cu_q[b + 1] - s.q0;
    if (p.cu_k) {
      s.k0 = p.cu_k[b];
      s.Tk = p.cu_k[b + 1] - s.k0;
    }
    if (p.used) s.Tk = p.used[b];
  }
  if (p.left >= 0) s.lower = p.left - (s.Tk - s.Tq);
  if (p.right >= 0) s.upper = p.right + (s.Tk - s.Tq);
  if (p.causal && s.upper > 0) s.upper = 0;
  return s;
}

// Blocks of SIZE keys for the rows `first` up to `last` of a key head, of the keys from lo to hi: those
// from `begin` to `end` hold a key that some row sees; those from full_begin to full_end are whole and
// seen by all of these rows.
struct KeyBlocks { int begin, full_begin, full_end, end; };

template <int SIZE>
FASTLM_DEVICE KeyBlocks key_blocks(const Sequence& s, int i_first, int i_last, int lo, int hi) {
  const auto clamp = [](int64_t x, int low, int high) { return int(x < low ? low : x > high ? high : x); };
  const int64_t first = int64_t(i_first) - s.lower, last_lower = int64_t(i_last) - s.lower;
  const int seen_lo = clamp(first, lo, hi), seen_hi = clamp(int64_t(i_last) + s.upper + 1, lo, hi);
  const int all_lo = clamp(last_lower, lo, hi), all_hi = clamp(int64_t(i_first) + s.upper + 1, lo, hi);
  KeyBlocks k{seen_lo / SIZE, (all_lo + SIZE - 1) / SIZE, all_hi / SIZE, (seen_hi + SIZE - 1) / SIZE};
  if (seen_hi <= seen_lo) k.end = k.begin;
  if (k.full_end <= k.full_begin) k.full_begin = k.full_end = k.end;
  return k;
}

// A row of scores: what its logits depend on beside the products.
struct Row {
  int i, head;         // query, and head of Q
  bool valid;
  int64_t mask;        // offset of its mask
  float slope;         // of ALiBi, in base 2
};

FASTLM_DEVICE Row row_of(const AttentionParams& p, const Sequence& s, int b, int hkv, int r) {
  Row row{r / p.group, hkv * p.group + r % p.group, r < s.Tq * p.group, 0, 0};
  if (!row.valid) row.i = s.Tq - 1;
  row.mask = b * p.mask_b + row.head * p.mask_h + row.i * p.mask_q;
  if (p.slopes && row.valid) row.slope = p.slopes[int64_t(b) * p.Hq + row.head] * kLog2e;
  return row;
}

FASTLM_DEVICE bool sees(const Sequence& s, int i, int j) { return j < s.Tk && j >= i - s.lower && j <= i + s.upper; }

// The logits in base 2 out of the products x of a warp: row_at(m, n, c) and key_at(m, n, c) say whose x[m][n][c]
// is, and use_cap(m, n, c, cap) gets the tanh of its softcap. Keys behind the last get the mask of the last.
template <class T, int M, int N, class RowAt, class KeyAt, class UseCap>
FASTLM_DEVICE void logits(const AttentionParams& p, const Sequence& s, float (&x)[M][N][4], const RowAt& row_at,
                          const KeyAt& key_at, const UseCap& use_cap) {
  const auto each = [&](const auto& change) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) change(x[m][n][c], m, n, c);
      }
    }
  };
  // Option by option, not score by score: the loads of a mask are then under way together.
  const auto add_mask = [&](const auto* mask, const auto& add) {
    each([&](float& score, int m, int n, int c) {
      const int64_t j = min(key_at(m, n, c), s.Tk - 1);
      add(score, mask[row_at(m, n, c).mask + j * p.mask_k]);
    });
  };
  if (p.softcap > 0) {
    each([&](float& score, int m, int n, int c) {
      const float cap = tanh_of(score * (p.scale / p.softcap));
      use_cap(m, n, c, cap);
      score = cap * (p.softcap * kLog2e);
    });
  } else {
    each([&](float& score, int, int, int) { score *= p.scale * kLog2e; });
  }
  if (p.slopes)
    each([&](float& score, int m, int n, int c) {
      const Row& row = row_at(m, n, c);
      score -= fabsf(float(row.i + (s.Tk - s.Tq) - key_at(m, n, c))) * row.slope;
    });
  if (p.mask_kind == kBoolMask)
    add_mask(static_cast<const bool*>(p.mask), [](float& score, bool keep) { score = keep ? score : -kInfinity; });
  else if (p.mask_kind == kSameMask)
    add_mask(static_cast<const T*>(p.mask), [](float& score, T bias) { score += widen(bias) * kLog2e; });
  else if (p.mask_kind == kFloatMask)
    add_mask(static_cast<const float*>(p.mask), [](float& score, float bias) { score += bias * kLog2e; });
}

// load(n, stage) starts copies of tile n, use(n, stage) reads it, for every step-th n from `from` up to `to`. Of 1 to 3
// stages one is in use, and the tiles behind it are on their way to the others.
template <class Load, class Use>
FASTLM_DEVICE void stream_tiles(int from, int to, int step, int stages, const Load& load, const Use& use) {
  const int ahead = stages - 1;
  int stage = 0;
  for (int n = from - ahead * step; n < to; n += step) {
    if (ahead < 2) cp_async_wait<0>();
    else cp_async_wait<1>();
    __syncthreads();
    if (n + ahead * step < to) load(n + ahead * step, stage);
    cp_async_commit();
    stage = stage == ahead ? 0 : stage + 1;
    if (!ahead) {
      cp_async_wait<0>();
      __syncthreads();
    }
    if (n >= from) use(n, stage);
  }
}

// Where head h, row t of sequence b lies in a tensor of these strides. Nothing is negative: zeros extend an
// index to 64 bits, where a sign would take a register.
FASTLM_DEVICE int64_t offset_of(const HeadStrides& s, int b, int64_t first, int h, int64_t t) {
  return uint32_t(b) * s.b + uint32_t(h) * s.h + (first + t) * s.t;
}
// The same of key j, which may lie in a page.
FASTLM_DEVICE int64_t key_offset(const AttentionParams& p, const Sequence& s, const HeadStrides& at, int b, int h, int j) {
  if (!p.table) return offset_of(at, b, s.k0, h, j);
  const int64_t page = p.table[int64_t(b) * p.table_b + j / p.page_size];
  return page * at.b + h * at.h + j % p.page_size * at.t;
}

}  // namespace fastlm::cuda
