// GEGLU on a GPU over packed rows; T is float, math::BFloat16 or math::Half.
#pragma once

#include <cstdint>

#include "stream.h"

namespace rewardprop::cuda {

template <typename T>
struct Geglu {
    const T* x;  // (M, 2N): N hidden and N gate values in each row
    T* out;      // (M, N)
    std::int64_t rows;
    std::int64_t width;  // N
};

// The gradient of x, packed as x is, from that of out.
template <typename T>
struct GegluBackward {
    const T* grad;  // (M, N)
    const T* x;     // (M, 2N)
    T* grad_x;      // (M, 2N)
    std::int64_t rows;
    std::int64_t width;
};

template <typename T>
void run(const Geglu<T>& op, Stream stream);
template <typename T>
void run(const GegluBackward<T>& op, Stream stream);

}  // namespace rewardprop::cuda
