// Arguments of the cross-entropy operators on any device: shapes, layouts of logits, checks.
#pragma once
#include <vector>

#include "check.h"
#include "cpu/token_loss.h"

namespace fastlm {

enum Reduction : int64_t { kNone, kMean, kSum };  // torch's numbering

// Logits (C), (N, C) or (N, C, d1, ...) as [N][C][S].
struct LogitsSize { int64_t N, C, S; };

inline LogitsSize logits_size(const char* op, Ints logits) {
  const int64_t dim = int64_t(logits.size());
  STD_TORCH_CHECK(dim >= 1, "fastlm::", op, ": logits without a class dimension");
  LogitsSize n{dim == 1 ? 1 : logits[0], logits[dim == 1 ? 0 : 1], 1};
  for (int64_t i = 2; i < dim; ++i) n.S *= logits[i];
  return n;
}

// Shape of a value per token: that of the logits without the classes.
inline std::vector<int64_t> token_shape(Ints logits) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < int64_t(logits.size()); ++i)
    if (i != (logits.size() == 1 ? 0 : 1)) shape.push_back(logits[i]);
  return shape;
}

inline void check_reduction(int64_t reduction, const char* op) {
  STD_TORCH_CHECK(reduction >= kNone && reduction <= kSum, "fastlm::", op, ": unknown reduction ", reduction);
}

// Whether the target holds probabilities, of the logits' shape and dtype, or class indices, a token each.
inline bool has_probabilities(const Tensor& target, Ints logits, ScalarType dtype, const char* op) {
  const int64_t dim = int64_t(logits.size()), c = dim == 1 ? 0 : 1;
  if (target.dim() == dim) {
    for (int64_t i = 0; i < dim; ++i)
      STD_TORCH_CHECK(target.size(i) == logits[i], "fastlm::", op, ": target has shape ",
                      shape_string(target), ", not that of the logits");
    check_dtype(target, dtype, op, "target");
    return true;
  }
  STD_TORCH_CHECK(target.dim() == dim - 1, "fastlm::", op, ": target has shape ",
                  shape_string(target), ", expected that of the logits without the classes");
  for (int64_t i = 0, j = 0; i < dim; ++i)
    if (i != c)
      STD_TORCH_CHECK(target.size(j++) == logits[i], "fastlm::", op, ": target has shape ",
                      shape_string(target), ", expected that of the logits without the classes");
  check_dtype(target, ScalarType::Long, op, "target");
  return false;
}

// Strides of [N][C][S] for (C), (N, C) or (N, C, d1, ...), if the trailing dimensions are one.
inline bool merged_strides(const Tensor& t, Strides* at) {
  const int64_t dim = t.dim(), c = dim == 1 ? 0 : 1;
  *at = {dim == 1 ? 0 : t.stride(0), t.stride(c), dim > 2 ? t.stride(dim - 1) : 0};
  int64_t inner = 1, last = at->s;
  bool any = false;
  for (int64_t i = dim - 1; i >= 2; --i) {
    if (t.size(i) == 1) continue;
    if (!any) last = t.stride(i);
    else if (t.stride(i) != last * inner) return false;
    any = true;
    inner *= t.size(i);
  }
  at->s = any ? last : 0;
  if (t.size(c) == 1) at->c = 1;
  return true;
}

// Logits as a kernel can read them: classes contiguous, or positions.
struct Logits {
  std::optional<Tensor> tensor;
  Strides at;
  int64_t N, S;  // a matrix with tokens contiguous is [1][C][N]
  bool rows = false;  // classes are contiguous
};

inline bool view_logits(const Tensor& t, int64_t N, int64_t S, Logits* v) {
  v->tensor = t;
  v->N = N;
  v->S = S;
  if (!merged_strides(t, &v->at)) return false;
  if (S == 1) v->at.s = 1;
  if (v->at.c == 1) return v->rows = true;
  v->rows = false;
  if (S == 1 && N > 1 && v->at.n == 1) {
    v->at = {0, v->at.c, 1};
    v->N = 1;
    v->S = N;
    return true;
  }
  return S > 1 && v->at.s == 1;
}

// Shape of the logits of input (D) or (N, D) and linear_weight (C, D) or (C, d1, ..., dK, D), whose
// shape without D linear_bias has.
inline std::vector<int64_t> linear_logits(const char* op, const Tensor& input, const Tensor& linear_weight,
                                          const std::optional<Tensor>& linear_bias) {
  const int64_t dim = linear_weight.dim();
  STD_TORCH_CHECK(input.dim() == 1 || input.dim() == 2, "fastlm::", op, ": input has shape ", shape_string(input));
  STD_TORCH_CHECK(dim >= 2 && (dim == 2 || input.dim() == 2), "fastlm::", op, ": linear_weight has shape ",
                  shape_string(linear_weight));
  check_dtype(linear_weight, input.scalar_type(), op, "linear_weight");
  STD_TORCH_CHECK(linear_weight.size(dim - 1) == input.size(input.dim() - 1), "fastlm::", op,
                  ": linear_weight has shape ", shape_string(linear_weight), ", input ", shape_string(input));
  if (linear_bias) {
    check_dtype(*linear_bias, input.scalar_type(), op, "linear_bias");
    bool same = linear_bias->dim() == dim - 1;
    for (int64_t i = 0; same && i < dim - 1; ++i) same = linear_bias->size(i) == linear_weight.size(i);
    STD_TORCH_CHECK(same, "fastlm::", op, ": linear_bias has shape ", shape_string(*linear_bias));
  }
  std::vector<int64_t> logits;
  if (input.dim() == 2) logits.push_back(input.size(0));
  for (int64_t i = 0; i < dim - 1; ++i) logits.push_back(linear_weight.size(i));
  return logits;
}

}  // namespace fastlm
