// What the launchers (*.cu) share: the device of a call, its stream, checked launches, registration.
//
// Compiled by nvcc, operators register for CUDA tensors. Compiled by a C++ compiler against simt.h, the
// same source registers them in the namespace fastlm_cuda_host for CPU tensors, and a launch runs the
// kernel's blocks on the CPU.
#pragma once
#include <algorithm>
#include <iterator>
#include <vector>

#include "../check.h"
#include "device.cuh"

#ifdef __CUDACC__
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <tuple>
#define FASTLM_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(fastlm, CUDA, m)
#else
#define FASTLM_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(fastlm_cuda_host, CPU, m)
#endif

namespace fastlm::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tests that read the compiled kernels, and the sanitizers, look at some only, for all of them take the compiler
// long: not at float16, which compiles as bfloat16 does, and at attention, without tf32, for heads up to this size,
// if there is one. `make cuda-targets` takes all.
#ifdef FASTLM_SOME_KERNELS
inline constexpr int kOnlyHead = FASTLM_SOME_KERNELS;
#else
inline constexpr int kOnlyHead = 0;
#endif
inline constexpr bool kAllKernels = kOnlyHead == 0;

// Calls f(std::integral_constant<int, S>{}) for the least S of 32, 64, 128 and 256 that holds a head of `size`.
template <class F> void with_head_size(int size, const char* op, const F& f) {
  if constexpr (!kAllKernels) {
    STD_TORCH_CHECK(size <= kOnlyHead, "fastlm::", op, ": this build has no heads of ", size);
    return f(std::integral_constant<int, kOnlyHead>{});
  } else {
    if (size <= 32) f(std::integral_constant<int, 32>{});
    else if (size <= 64) f(std::integral_constant<int, 64>{});
    else if (size <= 128) f(std::integral_constant<int, 128>{});
    else f(std::integral_constant<int, 256>{});
  }
}

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastlm::", op, ": CUDA: ", cudaGetErrorString(error));
}

// A function of the torch that is loaded, or of a library that it is linked to; null where it has none. Looked
// up at run time: one build serves every CUDA build of torch, and can be linked where there is none.
template <class F> F* function_of_torch(const char* name) {
  void* const torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch ? reinterpret_cast<F*>(dlsym(torch, name)) : nullptr;
}

// torch's stream of a device.
inline cudaStream_t current_stream(int device, const char* op) {
  static const auto function = function_of_torch<int32_t(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(function && function(device, &stream) == 0, "fastlm::", op,
                  ": this torch gives no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Whether torch multiplies float32 in tf32 now, as torch.backends.cuda.matmul says: it gives out cuBLAS's
// handle in the mode that follows from that.
inline bool torch_multiplies_in_tf32() {
  static const auto handle_of = function_of_torch<int32_t(void**)>("torch_get_current_cuda_blas_handle");
  static const auto mode_of = function_of_torch<int(void*, int*)>("cublasGetMathMode");
  constexpr int kTf32 = 3;  // CUBLAS_TF32_TENSOR_OP_MATH
  void* handle = nullptr;
  int mode = 0;
  return handle_of && mode_of && handle_of(&handle) == 0 && mode_of(handle, &mode) == 0 && mode == kTf32;
}

// Makes the device of a tensor the current one while it lives, and launches on torch's stream there.
class Device {
 public:
  Device(const Tensor& t, const char* op)
      : op_(op), index_(t.get_device_index()), guard_(index_), stream_(current_stream(index_, op)) {
    multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    shared_bytes = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  }
  Device(const Device&) = delete;

  int multiprocessors;
  size_t shared_bytes;  // most that a block can have
  // Whether float32 is multiplied as tf32.
  bool uses_tf32() const { return attribute(cudaDevAttrComputeCapabilityMajor) >= 8 && torch_multiplies_in_tf32(); }

  template <class P> void launch(void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& params) {
    run(kernel, grid, threads, shared, params, false);
  }
  // All blocks run at the same time, and may meet in grid_barrier.
  template <class P>
  void launch_together(void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& params) {
    run(kernel, grid, threads, shared, params, true);
  }
  // Whether the code of the kernel that is loaded here is for blocks of so many threads. Asked once, for it never
  // changes.
  template <class P> bool runs(void (*kernel)(P), int threads) {
    static thread_local std::map<std::pair<int, void (*)(P)>, int> known;
    const auto [most, asked] = known.try_emplace({index_, kernel});
    if (asked) {
      cudaFuncAttributes attributes{};
      check_cuda(cudaFuncGetAttributes(&attributes, kernel), op_);
      most->second = attributes.maxThreadsPerBlock;
    }
    return most->second >= threads;
  }
  // Blocks of a kernel that the device holds at the same time. Asked once, for it never changes.
  template <class P> int blocks_at_once(void (*kernel)(P), int threads, size_t shared) {
    static thread_local std::map<std::tuple<int, void (*)(P), int, size_t>, int> known;
    const std::tuple asked{index_, kernel, threads, shared};
    if (const auto found = known.find(asked); found != known.end()) return found->second;
    allow(kernel, shared);
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), op_);
    return known[asked] = blocks * multiprocessors;
  }
  void zero(void* data, size_t bytes) { check_cuda(cudaMemsetAsync(data, 0, bytes, stream_), op_); }

 private:
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, index_), op_);
    return value;
  }
  // What a kernel may have is raised and never lowered: another thread's call may come between this one and
  // its launch.
  template <class P> void allow(void (*kernel)(P), size_t shared) {
    static std::mutex mutex;
    static std::map<std::pair<int, void (*)(P)>, size_t> allowed;
    if (shared <= 48 * 1024) return;
    const std::lock_guard lock(mutex);
    size_t& most = allowed[{index_, kernel}];
    if (shared <= most) return;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), op_);
    most = shared;
  }
  template <class P>
  void run(void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& params, bool together) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    allow(kernel, shared);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = &attribute;
    config.numAttrs = together ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&config, kernel, params), op_);
  }

  const char* op_;
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;  // torch's: no other device gets a context by its end
  cudaStream_t stream_;
};

#else

class Device {
 public:
  Device(const Tensor&, const char*) {}
  int multiprocessors = simt::gpu.multiprocessors;
  size_t shared_bytes = simt::gpu.shared_bytes;
  bool uses_tf32() const { return simt::gpu.tf32; }

  template <class P> void launch(void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& params) {
    run(kernel, grid, threads, shared, params, false);
  }
  template <class P>
  void launch_together(void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& params) {
    STD_TORCH_CHECK(int(grid.x) <= blocks_at_once(kernel, threads, shared), "more blocks than run at the same time");
    run(kernel, grid, threads, shared, params, true);
  }
  template <class P> bool runs(void (*)(P), int) { return simt::gpu.warpgroups; }
  template <class P> int blocks_at_once(void (*)(P), int threads, size_t shared) {
    if (shared > shared_bytes) return 0;
    if (!simt::gpu.listing) return multiprocessors;
    return multiprocessors * int(std::min(size_t(2048 / threads), (shared_bytes + 1024) / (shared + 1024)));
  }
  void zero(void* data, size_t bytes) { __builtin_memset(data, 0, bytes); }

 private:
  template <class P>
  void run(void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& params, bool together) {
    const auto name = reinterpret_cast<const void*>(kernel);
    simt::launch(grid, dim3(unsigned(threads)), shared, together, [&] { kernel(params); }, name);
  }
};

#endif

// ---- values of the host, for the device ----------------------------------------------------

template <class E> struct ValueParams {
  E* to;
  int count;
  E values[4000 / sizeof(E)];  // a launch takes 4 KiB of parameters
};

template <class E> __global__ void store_values(const __grid_constant__ ValueParams<E> p) {
  for (int i = int(threadIdx.x); i < p.count; i += int(blockDim.x)) p.to[i] = p.values[i];
}

// At the stream's turn; `from` may go at once. They travel as parameters: a copy from pageable memory may
// wait for the stream, and a graph would read that memory again at each replay.
template <class E> void copy_in(Device& device, E* to, const std::vector<E>& from) {
  ValueParams<E> p;
  for (size_t i = 0; i < from.size(); i += std::size(p.values)) {
    p.to = to + i;
    p.count = int(std::min(std::size(p.values), from.size() - i));
    std::copy_n(&from[i], p.count, p.values);
    device.launch(store_values<E>, dim3(1), 128, 0, p);
  }
}

}  // namespace fastlm::cuda
