// What lets one function be compiled for every CPU instruction set and, by nvcc, for GPUs.
#pragma once

// Functions in this folder are `static`: these headers are compiled once per instruction set, and a
// shared inline function could be taken by the linker from the AVX-512 object into code that runs
// on a machine without it.
#if defined(__CUDACC__)
#define REWARDPROP_FUNCTION static __host__ __device__ __forceinline__
#else
#define REWARDPROP_FUNCTION static inline
#endif

namespace rewardprop::math {

// a b + c, rounded once where the target has such an instruction. Only where its error does not
// matter to the last bit: a call to the C library, which rounds once everywhere, is no loop that
// vectorises.
REWARDPROP_FUNCTION float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

}  // namespace rewardprop::math
