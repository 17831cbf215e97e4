// Where a kernel runs.
#pragma once

#include <cstdint>

namespace rewardprop::cuda {

struct Stream {
    int device;             // the device's number
    std::uintptr_t handle;  // the cudaStream_t, as torch's `cuda_stream` gives it
};

}  // namespace rewardprop::cuda
