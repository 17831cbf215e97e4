// Sums over a block, in an order that depends on nothing but the block's size.
#pragma once

#include "platform.cuh"

namespace rewardprop::cuda {

struct Pair {
    float a;
    float b;
};

// Every lane gets the sum over the warp.
__device__ __forceinline__ Pair warp_sum(Pair value) {
    for (int distance = 16; distance > 0; distance /= 2) {
        value.a += __shfl_xor_sync(0xFFFFFFFFu, value.a, distance);
        value.b += __shfl_xor_sync(0xFFFFFFFFu, value.b, distance);
    }
    return value;
}

struct SumsOfWarps {
    Pair of[32];
};

// Every thread gets the sum over a block of whole warps. A barrier for memory as well.
__device__ __forceinline__ Pair block_sum(Pair value) {
    SumsOfWarps& sums = shared_memory<SumsOfWarps>();
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) sums.of[threadIdx.x / 32] = value;
    __syncthreads();
    Pair total{0.0f, 0.0f};
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
        total.a += sums.of[warp].a;
        total.b += sums.of[warp].b;
    }
    __syncthreads();  // before the next sum takes this one's place
    return total;
}

}  // namespace rewardprop::cuda
