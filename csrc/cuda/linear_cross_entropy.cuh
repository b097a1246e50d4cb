// What lies between the products of the linear cross-entropy and its results.
#pragma once
#include "cross_entropy.cuh"

namespace fastlm::cuda {

// sum = product, or sum + product; or, with a result, result = scale times that.
struct FoldParams {
  int64_t count;
  const void* product;  // [count] of T
  void* sum;            // [count] of T, read unless `first`, written without a result
  bool first;
  void* result;         // [count] of Out, may be sum; or null
  const void* scale;    // one T, or null: 1
};

inline constexpr int kFoldThreads = 256;

// All start at 16 bytes. A thread has as many elements as 16 bytes of T hold.
template <class T, class Out>
__global__ void __launch_bounds__(kFoldThreads) fold_product(const __grid_constant__ FoldParams p) {
  constexpr int W = kPerVector<T>;
  const T scale = p.scale ? *static_cast<const T*>(p.scale) : T(1);
  const auto fold = [&](auto at, int64_t i) {
    using A = decltype(at);
    const auto product = Classes<T, A>::load(static_cast<const T*>(p.product) + i, 0, 1);
    T x[A::kWidth];
#pragma unroll
    for (int j = 0; j < A::kWidth; ++j) x[j] = product[j];
    if (!p.first) {
      const auto sum = Classes<T, A>::load(static_cast<const T*>(p.sum) + i, 0, 1);
#pragma unroll
      for (int j = 0; j < A::kWidth; ++j) x[j] += sum[j];
    }
    if (!p.result) return store_classes<A>(static_cast<T*>(p.sum) + i, 0, 1, x);
#pragma unroll
    for (int j = 0; j < A::kWidth; ++j) x[j] *= scale;
    store_classes<A>(static_cast<Out*>(p.result) + i, 0, 1, x);
  };
  const int64_t i = (int64_t(blockIdx.x) * kFoldThreads + threadIdx.x) * W;
  if (i + W <= p.count) return fold(Access<W, true>{}, i);
  for (int64_t j = i; j < p.count; ++j) fold(Access<1, false>{}, j);
}

}  // namespace fastlm::cuda
