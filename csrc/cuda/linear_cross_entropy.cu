// fastlm::linear_cross_entropy and its backward on a GPU. With X (N, D), W (C, S, D), bias (C, S), where S
// heads have a loss each, for one chunk of tokens after another:
//
//   logits = X W^T        (n, C S) in float32 (float64): torch's product, that is cuBLAS
//   lse, loss, G          cross_entropy.cuh over [n][C][S]; G, the logits' gradient, of the storage type
//   dX = G W
//   dW += G^T X           slice by slice of classes, whose float32 product stays in L2 until it is added
//
// Logits are not rounded to 16 bits, and neither are sums before their end. Kept for a backward: lse and
// low, two numbers a token; it costs a fourth product.
//
// One fused kernel, as in the Triton family, has neither logits nor partial sums of dW in memory, but it
// multiplies X W^T twice. On paper, H100 (cuBLAS 640 TFLOP/s, mma.sync 480, 3 TB/s), 50257 classes, a
// logit's share of forward and gradients: D = 768: 7.2 ps in three products and 6.7 ps for 14 bytes of
// logits and G and 6 of dW, against 12.8 ps in four; D = 4096: 38 + 15 ps against 68.
#include "linear_cross_entropy.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cross_entropy.h"

namespace fastlm::cuda {
namespace {

// Bytes for logits and G of a chunk, but at least kTokens tokens: sums of dW, fetched and stored once a
// chunk, then take a third of the time of its products or less. kSlice: bytes of a product of dW. kWhole: classes
// beyond the last multiple of it are multiplied apart. For an odd number cuBLAS has slow kernels: 50257 logits of
// 1024 tokens, D = 768, in bfloat16 take 830 us of an H100 in one product, 150 and 7 in two, dX 640 or 105 and 8.
#ifdef __CUDACC__
constexpr int64_t kScratch = 256 << 20, kTokens = 1024, kSlice = 16 << 20, kWhole = 64;
#else
constexpr int64_t kScratch = 16 << 10, kTokens = 64, kSlice = 4 << 10, kWhole = 8;  // several of each in small tests
#endif

using torch::stable::narrow;
using torch::stable::transpose;

// Where element i of `bytes` bytes is.
template <class P> P* element(P* data, int64_t i, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return data ? reinterpret_cast<P*>(reinterpret_cast<Byte*>(data) + i * bytes) : nullptr;
}

// T: the compute type; the storage type is that of x, w, bias and all gradients.
struct Linear {
  Device& device;
  Loss& loss;
  bool forward;
  Tensor x, w;                // (N, D), (C S, D)
  OptionalTensor bias;        // (C S)
  OptionalTensor dx, dw, db;  // as x, w, bias; those that are wanted

  // What follows from these.
  const int64_t N = loss.size.N, S = loss.size.S, V = loss.size.C * S, D = x.size(1);
  const int64_t wide = loss.compute == ScalarType::Double ? 8 : 4, stored = int64_t(x.element_size());
  const bool mixed = wide != stored, gradient = dx || dw || db;
  const int64_t whole = V > kWhole ? V / kWhole * kWhole : V;
  int64_t slice = 0;                                 // classes of a product of dW
  OptionalTensor logits{}, g{}, ones{}, products{};  // (n, row) of T, (n, row), (1, n); g may be logits
  OptionalTensor rest{};                             // (n, D) of T, the share in dX of the classes behind `whole`
  OptionalTensor dw_sum{}, db_sum{};                 // as w, bias, of T, where there are several chunks

  void run();
  void allocate(int64_t n);
  void chunk(int64_t first, int64_t n);
  void run_kernel(int64_t first, int64_t n);
  void fold(const OptionalTensor& sum, const Tensor& result, int64_t offset, int64_t count, bool first, bool last);
  // (rows, columns) at the beginning of products
  Tensor product_of(int64_t rows, int64_t columns) {
    const int64_t size[] = {rows, columns};
    return torch::stable::view(narrow(*products, 0, 0, rows * columns), Ints(size, 2));
  }
  // Rows from the first on, of columns that are classes.
  static Tensor part(Tensor t, int64_t rows, int64_t from, int64_t to) {
    t = narrow(t, 0, 0, rows);
    return narrow(t, 1, from, to - from);
  }
  Tensor weights(int64_t from, int64_t to) { return narrow(w, 0, from, to - from); }
};

void Linear::run() {
  const int64_t bytes = V * (wide + (gradient && mixed ? stored : 0)) + (dx ? D * wide : 0);
  const int64_t n = std::max(kTokens, kScratch / std::max<int64_t>(bytes, 1) / 64 * 64);
  allocate(std::min(n, N));
  for (int64_t first = 0; first < N; first += n) chunk(first, std::min(n, N - first));
  if (N > 0) return;
  if (dw) torch::stable::zero_(*dw);
  if (db) torch::stable::zero_(*db);
}

void Linear::allocate(int64_t n) {
  const ScalarType T = loss.compute;
  const int64_t row = ceil_div(V, 64) * 64;  // of whole cache lines
  logits = g = new_like(x, {n, row}, T);
  if (!gradient) return;
  if (mixed) g = new_like(x, {n, row}, loss.dtype);
  slice = std::min(V, std::max<int64_t>(kSlice / std::max<int64_t>(D * wide, 1) / 64 * 64, 64));
  products = new_like(x, {std::max({dx ? n * D : 0, dw ? slice * D : 0, db ? V : 0})}, T);
  if (dx && whole < V) rest = new_like(x, {n, D}, T);
  if (db) ones = torch::stable::fill_(new_like(x, {1, n}, loss.dtype), 1);
  if (n == N) return;
  if (dw) dw_sum = mixed ? new_like(x, {V, D}, T) : *dw;
  if (db) db_sum = mixed ? new_like(x, {V}, T) : *db;
}

void Linear::chunk(int64_t first, int64_t n) {
  const Tensor rows = narrow(x, 0, first, n);
  product(part(*logits, n, 0, whole), rows, transpose(weights(0, whole), 0, 1));
  if (whole < V) product(part(*logits, n, whole, V), rows, transpose(weights(whole, V), 0, 1));
  run_kernel(first, n);
  if (!gradient) return;
  Tensor dlogits = part(*g, n, 0, V);
  const bool begins = first == 0, ends = first + n == N;
  if (dx) {
    product(product_of(n, D), part(dlogits, n, 0, whole), weights(0, whole));
    if (rest) product(narrow(*rest, 0, 0, n), part(dlogits, n, whole, V), weights(whole, V));
    fold(rest, narrow(*dx, 0, first, n), 0, n * D, !rest, true);
  }
  for (int64_t c = 0; dw && c < V; c += slice) {
    const int64_t columns = std::min(slice, V - c);
    product(product_of(columns, D), transpose(narrow(dlogits, 1, c, columns), 0, 1), rows);
    fold(dw_sum, *dw, c * D, columns * D, begins, ends);
  }
  if (db) {
    product(product_of(1, V), narrow(*ones, 1, 0, n), dlogits);
    fold(db_sum, *db, 0, V, begins, ends);
  }
}

// lse and loss of the chunk's tokens, in the forward, and the gradient of their logits.
void Linear::run_kernel(int64_t first, int64_t n) {
  CrossEntropyParams p{};
  TokenLoss& t = p.token = loss.token;
  const int64_t i = first * S, row = logits->stride(0);
  t.target = element(t.target, i, 8);
  t.probs = element(t.probs, first * t.probs_at.n, stored);
  for (void** data : {&t.loss, &t.lse, &t.low}) *data = element(*data, i, wide);
  for (const void** data : {&t.dloss, &t.dlse}) *data = element(*data, i, wide);
  p.N = n;
  p.C = int(loss.size.C);
  p.S = S;
  p.input = logits->const_data_ptr();
  p.input_at = p.dinput_at = {row, S, 1};
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.dinput = gradient ? g->mutable_data_ptr() : nullptr;
  p.forward = forward;
  switch (loss.dtype) {
    case ScalarType::BFloat16: return launch_cross_entropy<float, bf16>(device, p, S == 1);
    case ScalarType::Half: return launch_cross_entropy<float, f16>(device, p, S == 1);
    default: return run_cross_entropy(device, p, wide == 8 ? kF64 : kF32, S == 1);
  }
}

// The first `count` elements of products, for those of `sum` and `result` from `offset` on.
void Linear::fold(const OptionalTensor& sum, const Tensor& result, int64_t offset, int64_t count, bool first,
                  bool last) {
  FoldParams p{};
  p.count = count;
  p.product = products->const_data_ptr();
  p.sum = sum ? element(sum->mutable_data_ptr(), offset, wide) : nullptr;
  p.first = first;
  if (last) {
    p.result = element(result.mutable_data_ptr(), offset, stored);
    p.scale = loss.scale_apart;
  }
  const dim3 blocks(unsigned(ceil_div(count, kFoldThreads * (16 / wide))));
  switch (loss.dtype) {
    case ScalarType::Double: return device.launch(fold_product<double, double>, blocks, kFoldThreads, 0, p);
    case ScalarType::Float: return device.launch(fold_product<float, float>, blocks, kFoldThreads, 0, p);
    case ScalarType::BFloat16: return device.launch(fold_product<float, bf16>, blocks, kFoldThreads, 0, p);
    case ScalarType::Half: return device.launch(fold_product<float, f16>, blocks, kFoldThreads, 0, p);
    default: STD_TORCH_CHECK(false, "fastlm::linear_cross_entropy: no kernel for this dtype");
  }
}

struct Gradients { Tensor input, linear_weight, linear_bias; };

// Runs the chunks; the gradients that were not asked for are empty.
Gradients run_linear(Device& device, Loss& loss, bool forward, const Tensor& input, const Tensor& linear_weight,
                     const OptionalTensor& linear_bias, bool dinput, bool dweight, bool dbias) {
  const auto flat = [](const Tensor& t, std::initializer_list<int64_t> size) {
    return torch::stable::reshape(t, Ints(size.begin(), size.size()));
  };
  const auto output = [&](const OptionalTensor& like, bool wanted) {
    if (!wanted || !like) return new_like(input, {0}, loss.dtype);
    return new_like(input, {like->sizes().begin(), like->sizes().end()}, loss.dtype);
  };
  if (linear_bias) check_device(*linear_bias, input, "linear_cross_entropy", "linear_bias");
  dbias = dbias && linear_bias;
  const Gradients g{output(input, dinput), output(linear_weight, dweight), output(linear_bias, dbias)};
  const int64_t V = loss.size.C * loss.size.S, D = input.size(input.dim() - 1);
  const auto optional = [&](bool wanted, const Tensor& t, std::initializer_list<int64_t> size) {
    return wanted ? OptionalTensor(flat(t, size)) : OptionalTensor();
  };
  Linear{device, loss, forward, flat(input, {loss.size.N, D}), flat(linear_weight, {V, D}),
         linear_bias ? OptionalTensor(fastlm::contiguous(*linear_bias)) : OptionalTensor(),
         optional(dinput, g.input, {loss.size.N, D}), optional(dweight, g.linear_weight, {V, D}),
         optional(dbias, g.linear_bias, {V})}
      .run();
  return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptionalTensor& linear_bias,
    const OptionalTensor& weight, int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap, bool full_precision, bool input_gradient, bool weight_gradient, bool bias_gradient) {
  const char* op = "linear_cross_entropy";
  dtype_of(input, op, "input");
  const auto logits = linear_logits(op, input, linear_weight, linear_bias);
  Device device(input, op);
  Loss loss(device, op, Ints(logits.data(), logits.size()), input, target, weight,
            {reduction, ignore_index, label_smoothing, z_loss, softcap});
  loss.start_forward(input_gradient || weight_gradient || bias_gradient, true);
  loss.token.lse_everywhere = true;
  const auto g = run_linear(device, loss, true, input, linear_weight, linear_bias, input_gradient, weight_gradient,
                            bias_gradient);
  return {loss.reduced(full_precision), loss.lse, loss.low, g.input, g.linear_weight, g.linear_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& dloss, const OptionalTensor& dlse, const Tensor& input, const Tensor& linear_weight,
    const Tensor& target, const OptionalTensor& linear_bias, const OptionalTensor& weight, const Tensor& lse,
    const Tensor& low, int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap, bool input_gradient, bool weight_gradient, bool bias_gradient) {
  const char* op = "linear_cross_entropy_backward";
  dtype_of(input, op, "input");
  const auto logits = linear_logits(op, input, linear_weight, linear_bias);
  Device device(input, op);
  Loss loss(device, op, Ints(logits.data(), logits.size()), input, target, weight,
            {reduction, ignore_index, label_smoothing, z_loss, softcap});
  loss.start_backward(dloss, dlse, lse, low, true);
  const auto g = run_linear(device, loss, false, input, linear_weight, linear_bias, input_gradient, weight_gradient,
                            bias_gradient);
  return {g.input, g.linear_weight, g.linear_bias};
}

FASTLM_OPERATORS(m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace
}  // namespace fastlm::cuda
