// The launch of a kernel in which every thread takes one pack of neighbouring elements.
#pragma once

#include <cstdint>

#include "../math/portable.h"

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

// a / b for positive numbers. A GPU takes several times as long for 64 bits as for 32, and all
// threads of a launch take the same branch.
REWARDPROP_FUNCTION std::int64_t divide(std::int64_t a, std::int64_t b) {
    if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
    return a / b;
}

}  // namespace rewardprop::cuda
