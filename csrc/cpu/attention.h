// Softmax attention without its T x T matrix (FlashAttention: Dao et al., 2022; Dao, 2023).
//
//   S = softcap(scale Q K^T) + bias,  P = softmax(S),  O = dropout(P) V
//
// Q, K, V and O are (B, H, T, D) by strides, the last dimension contiguous; Hq = group * Hkv query
// heads share Hkv heads of keys and values. Lanes of vectors are queries: a tile of S is kept as
// [key][query], so K and V are read in their natural layout, a row's maximum and sum run down the
// tile, and no tile is ever turned around. Kept for the backward: lse = log sum exp S per query.
//
// Letters: B batch, H heads, T length, D size of a head of Q and K, Dv of V; i a query, j a key.
// Here: the parameters, and what forward and backward share (blocks of rows, packing, scores).
#pragma once
#include "kernels.h"

namespace fastlm {

// One entry of the batch (or one packed sequence). Offsets are in elements.
struct AttentionSequence {
  int64_t Tq, Tk;
  int64_t lower, upper;              // query i sees the keys i - lower <= j <= i + upper
  int64_t q, k, v, out, lse;         // where head 0, row 0 lies
  int64_t dout, dq, dk, dv, sums;    // the same in the gradients and in the accumulators
  const int32_t* pages;              // paged keys: page of every page_size keys; else null
  int64_t split_keys, splits;        // keys are divided so where there are few queries
  int64_t partial;                   // first row in the partial results of the splits
};

// A block of queries of one (batch entry, key head): rows r = (h - group * hkv) * Tq + i.
struct AttentionItem {
  int32_t b, hkv;
  int64_t row, rows;
  int64_t split;  // -1: all keys, and the result is final
};

struct AttentionStrides { int64_t h, t; };

enum MaskKind : int { kNoMask, kBoolMask, kSameMask, kFloatMask };  // of the dtype of Q; of float32

struct AttentionParams {
  int64_t B, Hq, Hkv, D, Dv;
  const AttentionSequence* sequences;  // [B]
  const AttentionItem* items;          // [n_items]
  int64_t n_items;
  const void *q, *k, *v;
  AttentionStrides qs, ks, vs, os;
  int64_t lse_h;                       // stride of lse over heads; its rows are contiguous
  int64_t page_size, k_page, v_page;   // strides of a page
  double scale, softcap;               // softcap 0: none
  MaskKind mask_kind;
  const void* mask;
  int64_t mask_b, mask_h, mask_q, mask_k;  // strides; 0 where broadcast
  const void* slopes;                  // [B][Hq] compute type, or null
  const void* sinks;                   // [Hq] compute type, or null
  bool dropout;
  uint32_t drop_below;                 // a weight is dropped if its random word is below
  double keep_scale;                   // 1 / (1 - p); 0 for p = 1
  uint64_t seed;
  void* out;                           // S
  void* lse;                           // compute type
  void *partial_out, *partial_lse;     // compute type, [rows of all splits][Dv] and [...]

  // backward
  const void *dout, *dlse;             // dlse laid out as lse, or null
  AttentionStrides dos;
  void *dq, *dk, *dv;                  // S
  AttentionStrides dqs, dks, dvs;
  void* accumulators;                  // compute type: sums of dk and dv per part; null: dk and dv
  int64_t parts;                       // the queries of one key head are dealt to so many owners
  void* dsinks;                        // compute type [Hq], or null
  void* delta;                         // compute type, laid out as lse, where it is kept; else null
  bool delta_given;                    // delta is read, not written
  void* dbias;                         // gradient of the mask: compute type, contiguous, or null
  int64_t bias_b, bias_h, bias_q, bias_k;  // its sizes; 1 where broadcast
  void* dslopes;                       // compute type [B][Hq], or null
  Pool pool;
};

inline constexpr int64_t kRowBlock = 96;  // most queries in a block: a multiple of every micro-tile
inline constexpr int64_t kKeyBlock = 64;
inline constexpr int64_t kUnbounded = int64_t(1) << 40;

struct AttentionKernels {
  void (*forward[kDTypes])(const AttentionParams&);
  void (*backward[kDTypes])(const AttentionParams&);
  void (*bias_backward[kDTypes])(const AttentionParams&);
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "attention_forward.h"
#include "attention_backward.h"

namespace fastlm::FASTLM_ISA {

void fill(AttentionKernels& k) {
  k.forward[kF64] = attention_forward<double>;
  k.forward[kF32] = attention_forward<float>;
  k.forward[kBF16] = attention_forward<bf16>;
  k.forward[kF16] = attention_forward<f16>;
  k.backward[kF64] = attention_backward<double>;
  k.backward[kF32] = attention_backward<float>;
  k.backward[kBF16] = attention_backward<bf16>;
  k.backward[kF16] = attention_backward<f16>;
  k.bias_backward[kF64] = attention_bias_backward<double>;
  k.bias_backward[kF32] = attention_bias_backward<float>;
  k.bias_backward[kBF16] = attention_bias_backward<bf16>;
  k.bias_backward[kF16] = attention_bias_backward<f16>;
}

}  // namespace fastlm::FASTLM_ISA
#endif
