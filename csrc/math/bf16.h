// bfloat16 as its 16 bits. Plain integer arithmetic, which compilers vectorise for every
// instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#endif

namespace rewardprop::math {

struct BFloat16 {
    std::uint16_t bits;
};

REWARDPROP_FUNCTION float to_float(float value) { return value; }

REWARDPROP_FUNCTION float to_float(BFloat16 value) {
    std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

REWARDPROP_FUNCTION void store(float value, float* out) { *out = value; }

// Rounds to nearest, ties to even, as PyTorch does; a NaN stays a NaN.
#if defined(__CUDA_ARCH__)
REWARDPROP_FUNCTION void store(float value, BFloat16* out) {
    out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
#else
REWARDPROP_FUNCTION void store(float value, BFloat16* out) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    out->bits = static_cast<std::uint16_t>(value != value ? 0x7FC0u : rounded);
}
#endif

}  // namespace rewardprop::math
