// Group normalisation for Python (rewardprop_fast/ops/group_norm_silu/native.py).
#include "../cpu/group_norm_silu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "arrays.h"
#include "operators.h"

namespace py = pybind11;

namespace rewardprop::bindings {

namespace {

using Address = std::optional<std::uintptr_t>;

Array array(const char* name, std::uintptr_t address, std::int64_t count, std::int64_t size) {
    return {name, address, count, size};
}
Array array(const char* name, Address address, std::int64_t count, std::int64_t size) {
    return {name, address.value_or(0), address ? count : 0, size};
}

template <typename T>
T* pointer(const Array& array) {
    return array.count > 0 ? array.as<T>() : nullptr;
}

// batch, channels, positions, groups, channels_last: as a tuple, and all arguments by position,
// since small tensors notice what a call costs.
using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool>;

cpu::GroupNormShape checked(const Sizes& sizes) {
    const auto [batch, channels, positions, groups, channels_last] = sizes;
    std::int64_t count = 0;
    if (batch < 0 || positions < 0 || groups < 1 || channels < groups || channels % groups != 0 ||
        __builtin_mul_overflow(batch, channels, &count) ||
        __builtin_mul_overflow(count, positions, &count) || count > INT64_MAX / 16) {
        throw std::invalid_argument(
            "batch " + std::to_string(batch) + ", channels " + std::to_string(channels) +
            ", positions " + std::to_string(positions) + " and groups " + std::to_string(groups) +
            " are not the sizes of an array in groups of channels");
    }
    return {batch, channels, positions, groups, channels_last};
}

template <typename T>
void forward(const cpu::GroupNormShape& shape, const Array& x, const Array& weight,
             const Array& bias, const Array& mean, const Array& rstd, const Array& y, double eps,
             bool silu) {
    const cpu::GroupNorm<T> op{shape,
                               x.as<const T>(),
                               pointer<const float>(weight),
                               pointer<const float>(bias),
                               mean.as<float>(),
                               rstd.as<float>(),
                               y.as<T>(),
                               eps,
                               silu};
    py::gil_scoped_release release;
    cpu::run(op);
}

template <typename T>
void backward(const cpu::GroupNormShape& shape, const Array& grad, const Array& x,
              const Array& mean, const Array& rstd, const Array& weight, const Array& bias,
              const Array& grad_x, const Array& grad_weight, const Array& grad_bias, bool silu) {
    const cpu::GroupNormBackward<T> op{shape,
                                       grad.as<const T>(),
                                       x.as<const T>(),
                                       mean.as<const float>(),
                                       rstd.as<const float>(),
                                       pointer<const float>(weight),
                                       pointer<const float>(bias),
                                       pointer<T>(grad_x),
                                       pointer<float>(grad_weight),
                                       pointer<float>(grad_bias),
                                       silu};
    py::gil_scoped_release release;
    cpu::run(op);
}

void group_norm_silu(const Sizes& sizes, std::uintptr_t x_address, Address weight_address,
                     Address bias_address, std::uintptr_t mean_address, std::uintptr_t rstd_address,
                     std::uintptr_t y_address, double eps, bool silu, const std::string& dtype) {
    const std::int64_t size = item_size("dtype", dtype), single = sizeof(float);
    const cpu::GroupNormShape shape = checked(sizes);
    const std::int64_t channels = shape.channels, statistics = shape.batch * shape.groups;
    const std::int64_t count = shape.batch * shape.image_size();
    const Array x = array("x", x_address, count, size);
    const Array weight = array("weight", weight_address, channels, single);
    const Array bias = array("bias", bias_address, channels, single);
    const Array mean = array("mean", mean_address, statistics, single);
    const Array rstd = array("rstd", rstd_address, statistics, single);
    const Array y = array("y", y_address, count, size);
    for (const Array* given : {&x, &weight, &bias, &mean, &rstd, &y}) check(*given);
    for (const Array* written : {&mean, &rstd, &y}) {
        for (const Array* read : {&x, &weight, &bias}) check_apart(*written, *read);
    }
    check_apart(mean, rstd);
    check_apart(y, mean);
    check_apart(y, rstd);

    const auto run = dtype == "float32" ? forward<float> : forward<math::BFloat16>;
    run(shape, x, weight, bias, mean, rstd, y, eps, silu);
}

void group_norm_silu_backward(const Sizes& sizes, std::uintptr_t grad_address,
                              std::uintptr_t x_address, std::uintptr_t mean_address,
                              std::uintptr_t rstd_address, Address weight_address,
                              Address bias_address, Address grad_x_address,
                              Address grad_weight_address, Address grad_bias_address, bool silu,
                              const std::string& dtype) {
    const std::int64_t size = item_size("dtype", dtype), single = sizeof(float);
    const cpu::GroupNormShape shape = checked(sizes);
    const std::int64_t channels = shape.channels, statistics = shape.batch * shape.groups;
    const std::int64_t count = shape.batch * shape.image_size();
    const Array grad = array("grad", grad_address, count, size);
    const Array x = array("x", x_address, count, size);
    const Array mean = array("mean", mean_address, statistics, single);
    const Array rstd = array("rstd", rstd_address, statistics, single);
    const Array weight = array("weight", weight_address, channels, single);
    const Array bias = array("bias", bias_address, channels, single);
    const Array grad_x = array("grad_x", grad_x_address, count, size);
    const Array grad_weight = array("grad_weight", grad_weight_address, channels, single);
    const Array grad_bias = array("grad_bias", grad_bias_address, channels, single);
    for (const Array* given :
         {&grad, &x, &mean, &rstd, &weight, &bias, &grad_x, &grad_weight, &grad_bias})
        check(*given);
    for (const Array* written : {&grad_x, &grad_weight, &grad_bias}) {
        for (const Array* read : {&grad, &x, &mean, &rstd, &weight, &bias})
            check_apart(*written, *read);
    }
    check_apart(grad_x, grad_weight);
    check_apart(grad_x, grad_bias);
    check_apart(grad_weight, grad_bias);

    const auto run = dtype == "float32" ? backward<float> : backward<math::BFloat16>;
    run(shape, grad, x, mean, rstd, weight, bias, grad_x, grad_weight, grad_bias, silu);
}

}  // namespace

void bind_group_norm_silu(py::module_& module) {
    module.def("group_norm_silu", &group_norm_silu, py::arg("sizes"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("rstd"), py::arg("y"),
               py::arg("eps"), py::arg("silu"), py::arg("dtype"),
               "Writes y, and mean and rstd (batch, groups). weight and bias (channels,) are "
               "float32 or None; x and y are dense, of `dtype`, channels first or last. sizes: "
               "batch, channels, positions, groups, channels_last.");
    module.def("group_norm_silu_backward", &group_norm_silu_backward, py::arg("sizes"),
               py::arg("grad"), py::arg("x"), py::arg("mean"), py::arg("rstd"), py::arg("weight"),
               py::arg("bias"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("grad_bias"),
               py::arg("silu"), py::arg("dtype"),
               "Writes those of grad_x, grad_weight and grad_bias that are not None.");
}

}  // namespace rewardprop::bindings
