// Tensors as the kernels take them: rows of whole 16-byte chunks.
//
// A tensor whose rows are no whole chunks, or do not start at multiples of 16 bytes, is copied to one of
// padded rows first; one that a kernel writes, afterwards.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "../check.h"

namespace fastlm::cuda {

using OptionalTensor = std::optional<Tensor>;

// Elements of a row of n, rounded up to chunks; at least one, which is 0 where n is 0.
inline int64_t padded_size(const Tensor& t, int64_t n) {
  const int64_t chunk = 16 / int64_t(t.element_size());
  return std::max<int64_t>((n + chunk - 1) / chunk, 1) * chunk;
}

inline bool has_whole_rows(const Tensor& t) {
  const int64_t chunk = 16 / int64_t(t.element_size()), last = t.dim() - 1;
  if (t.size(last) == 0 || t.size(last) % chunk || t.stride(last) != 1) return false;
  for (int64_t d = 0; d < last; ++d)
    if (t.size(d) > 1 && t.stride(d) % chunk) return false;
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline Tensor new_like(const Tensor& t, const std::vector<int64_t>& size, ScalarType dtype) {
  return new_tensor(Ints(size.data(), size.size()), dtype, &t);
}

// What a kernel writes for `result`: itself, or a tensor of padded rows for `give_rows`.
inline Tensor rows_for(const Tensor& result) {
  if (has_whole_rows(result)) return result;
  std::vector<int64_t> size;
  for (int64_t d = 0; d < result.dim(); ++d) size.push_back(result.size(d));
  size.back() = padded_size(result, size.back());
  return new_like(result, size, result.scalar_type());
}

inline void give_rows(Tensor rows, Tensor result) {
  if (rows.get() == result.get()) return;
  torch::stable::copy_(result, torch::stable::narrow(rows, rows.dim() - 1, 0, result.size(-1)));
}

// What a kernel reads for t: itself, or a copy of padded rows.
inline Tensor whole_rows(const Tensor& t) {
  if (has_whole_rows(t)) return t;
  Tensor rows = rows_for(t);
  const int64_t last = t.dim() - 1, n = t.size(last);
  Tensor values = torch::stable::narrow(rows, last, 0, n);
  torch::stable::copy_(values, t);
  if (rows.size(last) > n) {
    Tensor padding = torch::stable::narrow(rows, last, n, rows.size(last) - n);
    torch::stable::zero_(padding);
  }
  return rows;
}

// out (M, N) = a (M, K) b (K, N) by torch's product, that is cuBLAS; summed in out's type: that of the
// factors, or float32 of 16-bit ones. The functional forms would follow autocast, this one does not.
inline void product(Tensor out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  if (out.numel() == 0) return;
  if (a.size(1) == 0) {
    torch::stable::zero_(out);
    return;
  }
  const auto call = [](const char* overload, auto stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // out once more
  };
  if (a.scalar_type() == out.scalar_type()) return call("out", std::array{from(a), from(b), from(out)});
#ifdef __CUDACC__
  call("dtype_out", std::array{from(a), from(b), from(out.scalar_type()), from(out)});
#else
  product(out, torch::stable::to(a, out.scalar_type()), torch::stable::to(b, out.scalar_type()));
#endif
}

}  // namespace fastlm::cuda
