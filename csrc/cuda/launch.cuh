// Launching a kernel: on a device, or in the emulation.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#include "platform.cuh"
#include "stream.h"

#if !defined(__CUDACC__)
#include "../emulation/launch.h"
#endif

namespace rewardprop::cuda {

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) +
                             "; it may come from an earlier kernel on this device)");
}

// The device is current until the end of the scope; then the one before it is again.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the current CUDA device");
        changed_ = before_ != device;
        if (changed_) check(cudaSetDevice(device), "choosing a CUDA device");
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

#endif

// Runs kernel(arguments...) on a grid of blocks. It returns before the kernel has run. Throws
// std::runtime_error, in words, where the kernel cannot be launched.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t dynamic_bytes, Stream stream, const Arguments&... arguments) {
#if defined(__CUDACC__)
    const OnDevice device(stream.device);
    kernel<<<grid, block, dynamic_bytes, reinterpret_cast<cudaStream_t>(stream.handle)>>>(
        arguments...);
    check(cudaGetLastError(), name);
#else
    static_cast<void>(name);
    static_cast<void>(stream);
    emulation::run_grid(grid, block, dynamic_bytes, [&] { kernel(arguments...); });
#endif
}

}  // namespace rewardprop::cuda
