// The launch of a kernel in which every thread takes one pack of neighbouring elements.
#pragma once

#include <cstdint>

namespace rewardprop::cuda {

constexpr int kElementwiseThreads = 256;

// Elements that a thread moves at once: 16 bytes of T where everything fits, otherwise one.
template <typename T>
constexpr int kPack = static_cast<int>(16 / sizeof(T));

inline bool aligned(const void* pointer, std::int64_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(bytes) == 0;
}

// Blocks that hold a thread for each of `packs`, at least one.
inline std::int64_t elementwise_blocks(std::int64_t packs) {
    return (packs + kElementwiseThreads - 1) / kElementwiseThreads;
}

}  // namespace rewardprop::cuda
