// Facts of the CUDA build, as C functions: fastlm/cuda.py reads them through ctypes.
#include <cuda_runtime_api.h>

#define FASTLM_API extern "C" __attribute__((visibility("default")))

// CUDA's version, as 13000, that this library was built with.
FASTLM_API int fastlm_cuda_version() { return CUDART_VERSION; }

// The GPUs it was built for, as "75;80"; the last one also as PTX, unless that is 75.
FASTLM_API const char* fastlm_cuda_archs() { return FASTLM_CUDA_ARCHS; }
