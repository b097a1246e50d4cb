// Attention's backward in bfloat16.
#include "attention_backward.h"

namespace fastlm::cuda {
template void run_backward<bf16>(BackwardCall&);
}  // namespace fastlm::cuda
