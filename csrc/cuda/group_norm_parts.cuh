// What both forms of group normalisation compute of an element. Legend: group_norm_silu.h.
#pragma once

#include <cmath>

#include "../math/bf16.h"
#include "../math/fp16.h"
#include "../math/silu.h"
#include "group_norm_silu.h"
#include "platform.cuh"

namespace rewardprop::cuda {

template <typename T>
__device__ __forceinline__ float parameter(const Parameter& of, std::int64_t channel,
                                           float otherwise) {
    if (of.data == nullptr) return otherwise;
    if (of.single) return static_cast<const float*>(of.data)[channel];
    return math::to_float(static_cast<const T*>(of.data)[channel]);
}

// dy / dz.
__device__ __forceinline__ float slope(float z, bool silu) {
    return silu ? math::silu_slope(z) : 1.0f;
}

__device__ __forceinline__ float reciprocal_deviation(float squares, float size, float eps) {
    return 1.0f / ::sqrtf(squares / size + eps);
}

// What an element's channel and group say of it.
struct Affine {
    float mean;
    float rstd;
    float weight;
    float bias;

    __device__ __forceinline__ float normalised(float x) const { return (x - mean) * rstd; }
    __device__ __forceinline__ float z(float xhat) const { return xhat * weight + bias; }
};

}  // namespace rewardprop::cuda
