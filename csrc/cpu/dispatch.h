// The kernel tables of the ISA in use.
#pragma once
#include "activation.h"
#include "attention.h"
#include "cross_entropy.h"
#include "gru.h"
#include "kernels.h"
#include "linear.h"
#include "linear_cross_entropy.h"
#include "peak.h"

namespace fastlm {

struct Kernels {
  const char* isa;
  bool (*runs_here)();
  ActivationKernels activation;
  AttentionKernels attention;
  CrossEntropyKernels cross_entropy;
  GruKernels gru;
  LinearKernels linear;
  LinearCrossEntropyKernels linear_cross_entropy;
  PeakKernels peak;
};

const Kernels& kernels();                      // FASTLM_ISA, else the last that runs here
const Kernels* all_kernels(int* count);        // every ISA that was built, from slow to fast
void use_kernels(const Kernels& k);

Pool torch_pool();

}  // namespace fastlm
