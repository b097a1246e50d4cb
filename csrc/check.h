// Input checks of the operators. The Python functions explain an argument's error to its user; these
// guard memory for whoever calls torch.ops.fastlm directly, with one line that names the argument.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "kept_memory.h"

#if defined(__linux__)  // new in torch 2.11
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* ctx), void* ctx);
#endif

namespace fastlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string shape_string(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return kF64;
    case ScalarType::Float: return kF32;
    case ScalarType::BFloat16: return kBF16;
    case ScalarType::Half: return kF16;
    default:
      STD_TORCH_CHECK(false, "fastlm::", op, ": ", name,
                      " must be float64, float32, bfloat16 or float16");
      return kDTypes;
  }
}

// The dtype in which a kernel computes and keeps statistics: float64 for float64, else float32.
inline ScalarType compute_type(ScalarType t) {
  return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const Tensor& t, ScalarType want, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == want, "fastlm::", op, ": ", name,
                  " has another dtype than required");
}

// The same for that of another tensor, by torch's numbers: scalar_type() makes up to 20 calls of one.
inline void check_same_dtype(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  int32_t dtype, want;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &want));
  STD_TORCH_CHECK(dtype == want, "fastlm::", op, ": ", name, " has another dtype than required");
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> want, const char* op,
                        const char* name) {
  const Ints size = t.sizes();
  if (size.size() == want.size() && std::equal(want.begin(), want.end(), size.begin())) return;
  std::string expected = "(";
  for (int64_t n : want) expected += (expected.size() > 1 ? ", " : "") + std::to_string(n);
  STD_TORCH_CHECK(false, "fastlm::", op, ": ", name, " has shape ", shape_string(t), ", expected ", expected, ")");
}

inline void check_device(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), "fastlm::", op,
                  ": ", name, " is on another device than input");
}

// Null where the memory can't be had, or torch can't take it.
inline AtenTensorHandle new_in_kept_memory(Ints size, Ints strides, int32_t dtype, size_t bytes) {
#if defined(__linux__)
  size_t held;
  void* const data = torch_from_blob ? KeptMemory::take(bytes, &held) : nullptr;
  if (!data) return nullptr;
  const auto give = [](void* p, void* n) { KeptMemory::give(p, reinterpret_cast<size_t>(n)); };
  AtenTensorHandle made;
  if (!torch_from_blob(data, int64_t(size.size()), size.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(),
                       -1, &made, aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(held)))
    return made;
  KeptMemory::give(data, held);
#else
  (void)size, (void)strides, (void)dtype, (void)bytes;
#endif
  return nullptr;
}

// Uninitialised, on the device of `like` or the CPU; the strides leave no gap.
inline Tensor new_strided(Ints size, Ints strides, ScalarType dtype, const Tensor* like) {
  int32_t device = aoti_torch_device_type_cpu(), index = 0;
  if (like) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like->get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like->get(), &index));
  }
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  if (device == aoti_torch_device_type_cpu()) {
    size_t bytes = aoti_torch_dtype_element_size(type);
    for (size_t i = 0; i < size.size(); ++i) bytes *= size_t(size[i]);
    if (bytes >= KeptMemory::kLeast) made = new_in_kept_memory(size, strides, type, bytes);
  }
  if (!made)
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), type, device,
                                                    index, &made));
  return Tensor(made);
}

// The same without a gap between the elements. The shim's own function: torch::stable::empty and new_empty are
// boxed calls, which take as long as a small kernel.
inline Tensor new_tensor(Ints size, ScalarType dtype, const Tensor* like = nullptr) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (size_t i = size.size(); i-- > 0; stride *= std::max<int64_t>(size[i], 1)) strides[i] = stride;
  return new_strided(size, Ints(strides.data(), strides.size()), dtype, like);
}

inline Tensor new_tensor(std::initializer_list<int64_t> size, ScalarType dtype, const Tensor* like = nullptr) {
  return new_tensor(Ints(size.begin(), size.size()), dtype, like);
}

// As torch.empty_like.
inline Tensor new_like(const Tensor& t) {
  const Tensor fresh = torch::stable::empty_like(t);
  if (size_t(fresh.numel()) * fresh.element_size() < KeptMemory::kLeast) return fresh;
  return new_strided(fresh.sizes(), fresh.strides(), t.scalar_type(), &t);  // untouched, `fresh` has cost nothing
}

inline Tensor contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace fastlm
