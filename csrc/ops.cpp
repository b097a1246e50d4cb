// Every operator schema of fastlm, and nothing else. Kernels register in csrc/cpu, csrc/cuda and
// fastlm/triton; shapes and the meaning of each argument stand with the functions of fastlm/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlm, m) {
}
