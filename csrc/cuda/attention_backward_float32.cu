// Attention's backward in float32.
#include "attention_backward.h"

namespace fastlm::cuda {
template void run_backward<float>(BackwardCall&);
}  // namespace fastlm::cuda
