// The part of CUDA's language that the kernels of csrc/cuda use, for g++.
//
// __shared__ is left out on purpose: csrc/cuda/platform.cuh has shared_memory<T>() for both.
#pragma once

#include <cstring>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::rewardprop::emulation::current->index)
#define blockIdx (::rewardprop::emulation::current->block->index)
#define blockDim (::rewardprop::emulation::current->block->size)
#define gridDim (::rewardprop::emulation::current->block->grid)

inline void __syncthreads() { rewardprop::emulation::current->block->barrier.wait(); }

namespace rewardprop::emulation {

// The value that lane `source` of this warp passes; all 32 lanes take part.
template <typename T>
T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t), "a shuffle passes at most 8 bytes");
    if (mask != 0xFFFFFFFFu) fail("a shuffle among a part of a warp");
    const Thread& thread = *current;
    Warp& warp = thread.warp();
    std::memcpy(&warp.words[static_cast<std::size_t>(thread.lane())], &value, sizeof(T));
    warp.barrier.wait();
    std::memcpy(&value, &warp.words[static_cast<std::size_t>(source)], sizeof(T));
    warp.barrier.wait();  // before a lane's next word takes this one's place
    return value;
}

}  // namespace rewardprop::emulation

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
    if (mask != 0xFFFFFFFFu) rewardprop::emulation::fail("__syncwarp of a part of a warp");
    rewardprop::emulation::current->warp().barrier.wait();
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    return rewardprop::emulation::exchange(mask, value,
                                           rewardprop::emulation::current->lane() ^ lane_mask);
}

// Lanes at the warp's end have nobody to ask and keep their own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    const int lane = rewardprop::emulation::current->lane();
    const int source = lane + static_cast<int>(delta);
    return rewardprop::emulation::exchange(mask, value,
                                           source < rewardprop::emulation::kWarp ? source : lane);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    return rewardprop::emulation::exchange(mask, value, source % rewardprop::emulation::kWarp);
}
