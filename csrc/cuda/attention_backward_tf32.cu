// Attention's backward in float32, its products in tf32.
#include "attention_backward.h"

namespace fastlm::cuda {
template void run_backward<tf32>(BackwardCall&);
}  // namespace fastlm::cuda
