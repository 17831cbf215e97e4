// float16 as its 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace rewardprop::math {

struct Half {
    std::uint16_t bits;
};

#if defined(__CUDA_ARCH__)

REWARDPROP_FUNCTION float to_float(Half value) {
    return __half2float(__ushort_as_half(value.bits));
}

REWARDPROP_FUNCTION void store(float value, Half* out) {
    out->bits = __half_as_ushort(__float2half_rn(value));
}

#else

// A float with the exponent moved: 2^112 times what the bits say as a float, also for subnormals.
REWARDPROP_FUNCTION float to_float(Half value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    std::uint32_t bits = static_cast<std::uint32_t>(value.bits & 0x7FFFu) << 13;
    if ((value.bits & 0x7C00u) == 0x7C00u) {
        bits |= 0x7F800000u;  // infinity or NaN
    } else {
        float scaled;
        std::memcpy(&scaled, &bits, sizeof(scaled));
        scaled *= 5.192296858534828e33f;  // 2^112, exact
        std::memcpy(&bits, &scaled, sizeof(bits));
    }
    bits |= sign;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

// Rounds to nearest, ties to even; too large becomes infinity; a NaN stays a NaN.
REWARDPROP_FUNCTION void store(float value, Half* out) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7FFFFFFFu;
    std::uint32_t result;
    if (bits > 0x7F800000u) {
        result = 0x7E00u;
    } else if (bits >= 0x477FF000u) {  // half-way between the largest, 65504, and 65536
        result = 0x7C00u;
    } else if (bits >= 0x38800000u) {  // normal: from 2^-14
        const std::uint32_t odd = (bits >> 13) & 1u;
        result = (bits - 0x38000000u + 0x0FFFu + odd) >> 13;
    } else {  // in units of 2^-24: adding 2^-1 rounds to them
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof(magnitude));
        magnitude += 0.5f;
        std::memcpy(&result, &magnitude, sizeof(result));
        result -= 0x3F000000u;
    }
    out->bits = static_cast<std::uint16_t>(sign | result);
}

#endif

}  // namespace rewardprop::math
