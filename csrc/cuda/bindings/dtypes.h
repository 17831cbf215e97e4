// The element types that GPU kernels take, by the names Python gives them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../math/bf16.h"
#include "../../math/fp16.h"

namespace rewardprop::cuda::bindings {

// Calls body(T{}) for the element type T of that name.
template <typename Body>
void with_type(const char* argument, const std::string& dtype, const Body& body) {
    if (dtype == "float32") return body(float{});
    if (dtype == "bfloat16") return body(math::BFloat16{});
    if (dtype == "float16") return body(math::Half{});
    throw std::invalid_argument(std::string(argument) + " is '" + dtype +
                                "'; allowed are float32, bfloat16 and float16");
}

}  // namespace rewardprop::cuda::bindings
