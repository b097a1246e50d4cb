// Attention's backward in float16.
#include "attention_backward.h"

namespace fastlm::cuda {
template void run_backward<f16>(BackwardCall&);
}  // namespace fastlm::cuda
