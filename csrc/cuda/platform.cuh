// What kernels are written in: CUDA under nvcc, and its emulation on the host under any other
// compiler, where tests run the same kernels under sanitizers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "../emulation/language.h"
#endif

namespace rewardprop::cuda {

// Memory that the block's threads share: one object for each T (and tag) of the block, not
// initialised.
//
//     struct Sums { float of_warp[32]; };
//     Sums& sums = shared_memory<Sums>();
template <typename T, int kTag = 0>
__device__ __forceinline__ T& shared_memory() {
#if defined(__CUDACC__)
    __shared__ T memory;
    return memory;
#else
    static const char key = 0;
    return *static_cast<T*>(emulation::current->block->shared(&key, sizeof(T)));
#endif
}

// Shared memory of the size that the launch asks for, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared_memory() {
#if defined(__CUDACC__)
    extern __shared__ __align__(16) unsigned char rewardprop_dynamic_shared[];
    return reinterpret_cast<T*>(rewardprop_dynamic_shared);
#else
    return static_cast<T*>(emulation::current->block->dynamic());
#endif
}

// N values that are loaded or stored as one: at most 16 bytes, at an address that is a multiple of
// their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    static_assert(sizeof(T) * N <= 16, "a thread moves at most 16 bytes at once");
    T values[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(const Pack<T, N>& pack, T* to) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

}  // namespace rewardprop::cuda
