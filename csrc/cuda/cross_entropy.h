// The host's part of the loss that both cross-entropy operators share: arguments, scalars that stay on
// the device, results.
#pragma once
#include <string>

#include "../loss.h"
#include "cross_entropy.cuh"
#include "launch.h"
#include "tensors.h"

namespace fastlm::cuda {

struct LossOptions {
  int64_t reduction, ignore_index;
  double label_smoothing, z_loss, softcap;
};

inline constexpr int64_t kMostClasses = int64_t(1) << 30;  // sums of two stay ints

// The kernel over logits of a type, with gradients and probabilities of the same or another one.
template <class In, class Out>
void launch_cross_entropy(Device& device, CrossEntropyParams p, bool rows) {
  using T = compute_t<In>;
  // Few instances: float64 is always taken as having every option.
  constexpr bool kPlain = sizeof(T) == 4;
  const TokenLoss& t = p.token;
  const bool plain = kPlain && t.target && t.label_smoothing == 0 && t.softcap == 0 && !p.bias;
  const int64_t count = p.N * p.S;
  if (rows && p.C * int64_t(sizeof(In)) > 128) {
    p.team = 32;
    while (p.team < kRowThreads && p.C / kRowWidth<In, Out> > 4 * p.team) p.team *= 4;
    const int threads = p.team < 128 ? 128 : p.team;
    const size_t shared = p.team == 32 ? 0 : sizeof(Running<T>) * size_t(p.team / 32);
    device.launch(plain ? cross_entropy_rows<In, Out, kPlain> : cross_entropy_rows<In, Out, false>,
                  dim3(unsigned(ceil_div(count * p.team, threads))), threads, shared, p);
  } else {
    p.team = p.C < 32 ? 1 : p.C < 128 ? 2 : kTokenThreads / 32;
    const int threads = 32 * (p.team < 4 ? 4 : p.team);
    device.launch(plain ? cross_entropy_tokens<In, Out, kPlain> : cross_entropy_tokens<In, Out, false>,
                  dim3(unsigned(ceil_div(count * p.team, threads))), threads,
                  p.team == 1 ? 0 : sizeof(Running<T>) * size_t(threads), p);
  }
}

// Logits and gradients of one type.
void run_cross_entropy(Device& device, const CrossEntropyParams& p, DType dtype, bool rows);

// The arguments that every form of the loss has, and the tensors that must outlive its pointers.
class Loss {
 public:
  // logits: their shape; like: a tensor of their dtype and device.
  Loss(Device& device, const char* op, Ints logits, const Tensor& like, const Tensor& target,
       const OptionalTensor& weight, const LossOptions& options);

  LogitsSize size;
  ScalarType dtype, compute;
  TokenLoss token{};
  // With `apart` below, and without a dlse: the scale that is not in `token`, for the caller to multiply
  // by; 0 where it would be infinite. One element of the compute dtype, or null: 1.
  const void* scale_apart = nullptr;
  Tensor lse, low;

  bool probabilities() const { return !token.target; }
  // Checks targets and makes loss, lse and low. gradient: one for an upstream gradient of 1 is wanted.
  void start_forward(bool gradient, bool apart);
  void start_backward(const Tensor& dloss, const OptionalTensor& dlse, const Tensor& lse, const Tensor& low,
                      bool apart);
  // In the compute dtype with full_precision, else in that of the logits.
  Tensor reduced(bool full_precision);

 private:
  enum Scalar : int { kTotal, kScale, kWeightSum, kInside, kScalars };  // one float64 each, or less

  void set_target(const Tensor& target, Ints logits);
  void set_weight(const Tensor& weight);
  void assert_targets();
  void* scalar(Scalar which) const;
  SumParams sum_of(SumOf of, int64_t count) const;
  SumParams denominator() const;
  void set_scale(SumParams& p, bool apart);
  void sum(SumParams p);
  const void* per_token(const Tensor& t, const char* name);

  Device& device_;
  const char* op_;
  Tensor like_, scalars_;
  int64_t reduction_;
  std::vector<int64_t> shape_;  // of a value per token
  OptionalTensor loss_;
  std::vector<Tensor> held_;
};

}  // namespace fastlm::cuda
