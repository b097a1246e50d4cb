// Every operator schema of fastlm, and nothing else. Kernels register in csrc/cpu, csrc/cuda and
// fastlm/triton; shapes and the meaning of each argument stand with the functions of fastlm/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlm, m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, bool return_lse, bool full_precision, "
      "bool gradient) -> (Tensor loss, Tensor lse, Tensor dinput)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor? dlse, Tensor input, Tensor target, "
      "Tensor? weight, Tensor lse, int reduction, int ignore_index, float label_smoothing, "
      "float z_loss, float softcap, bool input_gradient, bool target_gradient) "
      "-> (Tensor dinput, Tensor dtarget)");
}
