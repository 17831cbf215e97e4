// Group normalisation for Python (rewardprop_fast/ops/group_norm_silu/cuda.py).
#include "../group_norm_silu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "../../bindings/arrays.h"
#include "dtypes.h"
#include "operators.h"

namespace py = pybind11;

namespace rewardprop::cuda::bindings {

namespace {

using rewardprop::bindings::Array;
using rewardprop::bindings::check;
using rewardprop::bindings::check_apart;

using Address = std::optional<std::uintptr_t>;

Array array(const char* name, Address address, std::int64_t count, std::int64_t size) {
    return {name, address.value_or(0), address ? count : 0, size};
}

template <typename T>
T* pointer(const Array& array) {
    return array.count > 0 ? array.as<T>() : nullptr;
}

// Sizes of which a block can keep `arrays` groups in shared memory where `slice` is 0.
template <typename T>
GroupNormShape checked(std::int64_t batch, std::int64_t channels, std::int64_t positions,
                       std::int64_t groups, bool channels_last, std::int64_t slice,
                       std::int64_t arrays) {
    std::int64_t count = 0;
    if (batch < 0 || positions < 0 || groups < 1 || channels < groups || channels % groups != 0 ||
        __builtin_mul_overflow(batch, channels, &count) || count > INT32_MAX ||
        __builtin_mul_overflow(count, positions, &count) || count > INT64_MAX / 16) {
        throw std::invalid_argument(
            "batch " + std::to_string(batch) + ", channels " + std::to_string(channels) +
            ", positions " + std::to_string(positions) + " and groups " + std::to_string(groups) +
            " are not the sizes of an array in groups of channels");
    }
    const std::int64_t slices = slice > 0 ? (positions - 1) / slice + 1 : 0;
    if (slice < 0 || slice > INT32_MAX || slices > INT32_MAX / channels)
        throw std::invalid_argument("slice is " + std::to_string(slice));
    const GroupNormShape shape{batch, channels, positions, groups, channels_last, slice, slices};
    if (slice == 0 && arrays > 0 && !shape.can_be_kept(arrays, sizeof(T))) {
        throw std::invalid_argument("a group has " + std::to_string(shape.width()) + " * " +
                                    std::to_string(positions) +
                                    " elements, too many for one block; slice must not be 0");
    }
    return shape;
}

// Weight or bias: of the dtype of x, or float32.
bool is_single(const char* argument, const std::string& dtype, const std::string& of_x) {
    if (dtype != "float32" && dtype != of_x) {
        throw std::invalid_argument(std::string(argument) + " is '" + dtype +
                                    "'; allowed are that of x and float32");
    }
    return dtype == "float32";
}

std::int64_t group_norm_silu_slice(std::int64_t batch, std::int64_t channels,
                                   std::int64_t positions, std::int64_t groups, bool channels_last,
                                   int arrays, const std::string& dtype) {
    if (arrays < 1) throw std::invalid_argument("arrays is " + std::to_string(arrays));
    std::int64_t slice = 0;
    with_type("dtype", dtype, [&](auto element) {
        using T = decltype(element);
        slice = slice_of<T>(checked<T>(batch, channels, positions, groups, channels_last, 0, 0),
                            arrays);
    });
    return slice;
}

std::int64_t partial_count(const GroupNormShape& shape) {
    return shape.slice == 0 ? 0 : shape.batch * shape.slices * 2 * shape.channels;
}

void group_norm_silu(std::uintptr_t x_address, Address weight_address,
                     const std::string& weight_dtype, Address bias_address,
                     const std::string& bias_dtype, std::uintptr_t mean_address,
                     std::uintptr_t rstd_address, std::uintptr_t y_address, Address partial_address,
                     std::int64_t partial_room, std::int64_t batch, std::int64_t channels,
                     std::int64_t positions, std::int64_t groups, bool channels_last,
                     std::int64_t slice, double eps, bool silu, const std::string& dtype,
                     int device, std::uintptr_t stream) {
    with_type("dtype", dtype, [&](auto element) {
        using T = decltype(element);
        const GroupNormShape shape =
            checked<T>(batch, channels, positions, groups, channels_last, slice, 1);
        const bool weight_single = is_single("weight_dtype", weight_dtype, dtype);
        const bool bias_single = is_single("bias_dtype", bias_dtype, dtype);
        const Array x = array("x", x_address, shape.count(), sizeof(T));
        const Array weight = array("weight", weight_address, channels, weight_single ? 4 : 2);
        const Array bias = array("bias", bias_address, channels, bias_single ? 4 : 2);
        const Array mean = array("mean", mean_address, batch * groups, sizeof(float));
        const Array rstd = array("rstd", rstd_address, batch * groups, sizeof(float));
        const Array y = array("y", y_address, shape.count(), sizeof(T));
        const Array partial = array("partial", partial_address, partial_room, sizeof(float));
        for (const Array* given : {&x, &weight, &bias, &mean, &rstd, &y, &partial}) check(*given);
        rewardprop::bindings::check_count(partial, partial_count(shape));
        for (const Array* written : {&mean, &rstd, &y, &partial}) {
            for (const Array* read : {&x, &weight, &bias}) check_apart(*written, *read);
        }
        check_apart(mean, rstd);
        for (const Array* written : {&mean, &rstd}) {
            check_apart(y, *written);
            check_apart(partial, *written);
        }
        check_apart(y, partial);

        const GroupNorm<T> op{shape,
                              x.as<const T>(),
                              {pointer<const void>(weight), weight_single},
                              {pointer<const void>(bias), bias_single},
                              mean.as<float>(),
                              rstd.as<float>(),
                              y.as<T>(),
                              pointer<float>(partial),
                              static_cast<float>(eps),
                              silu};
        py::gil_scoped_release release;
        run(op, Stream{device, stream});
    });
}

void group_norm_silu_backward(std::uintptr_t grad_address, std::uintptr_t x_address,
                              std::uintptr_t mean_address, std::uintptr_t rstd_address,
                              Address weight_address, const std::string& weight_dtype,
                              Address bias_address, const std::string& bias_dtype,
                              Address grad_x_address, Address grad_weight_address,
                              Address grad_bias_address, Address sums_address,
                              Address partial_address, std::int64_t partial_room,
                              Address group_means_address, std::int64_t batch,
                              std::int64_t channels, std::int64_t positions, std::int64_t groups,
                              bool channels_last, std::int64_t slice, bool silu,
                              const std::string& dtype, int device, std::uintptr_t stream) {
    with_type("dtype", dtype, [&](auto element) {
        using T = decltype(element);
        const GroupNormShape shape =
            checked<T>(batch, channels, positions, groups, channels_last, slice, 2);
        const bool weight_single = is_single("weight_dtype", weight_dtype, dtype);
        const bool bias_single = is_single("bias_dtype", bias_dtype, dtype);
        const std::int64_t weight_size = weight_single ? 4 : 2, bias_size = bias_single ? 4 : 2;
        const Array grad = array("grad", grad_address, shape.count(), sizeof(T));
        const Array x = array("x", x_address, shape.count(), sizeof(T));
        const Array mean = array("mean", mean_address, batch * groups, sizeof(float));
        const Array rstd = array("rstd", rstd_address, batch * groups, sizeof(float));
        const Array weight = array("weight", weight_address, channels, weight_size);
        const Array bias = array("bias", bias_address, channels, bias_size);
        const Array grad_x = array("grad_x", grad_x_address, shape.count(), sizeof(T));
        const Array grad_weight = array("grad_weight", grad_weight_address, channels, weight_size);
        const Array grad_bias = array("grad_bias", grad_bias_address, channels, bias_size);
        const Array sums = array("sums", sums_address, 2 * batch * channels, sizeof(float));
        const Array partial = array("partial", partial_address, partial_room, sizeof(float));
        const Array means =
            array("group_means", group_means_address, 2 * batch * groups, sizeof(float));
        const Array* const read[] = {&grad, &x, &mean, &rstd, &weight, &bias};
        const Array* const written[] = {&grad_x, &grad_weight, &grad_bias, &sums, &partial, &means};
        for (const Array* given : read) check(*given);
        for (const Array* given : written) check(*given);
        rewardprop::bindings::check_count(partial, partial_count(shape));
        rewardprop::bindings::check_count(means, slice == 0 ? 0 : 2 * batch * groups);
        if (grad_weight_address || grad_bias_address)
            rewardprop::bindings::check_count(sums, 2 * batch * channels);
        for (const Array* out : written) {
            for (const Array* in : read) check_apart(*out, *in);
            for (const Array* other : written) {
                if (other != out) check_apart(*out, *other);
            }
        }

        const GroupNormBackward<T> op{shape,
                                      grad.as<const T>(),
                                      x.as<const T>(),
                                      mean.as<const float>(),
                                      rstd.as<const float>(),
                                      {pointer<const void>(weight), weight_single},
                                      {pointer<const void>(bias), bias_single},
                                      pointer<T>(grad_x),
                                      pointer<void>(grad_weight),
                                      pointer<void>(grad_bias),
                                      pointer<float>(sums),
                                      pointer<float>(partial),
                                      pointer<float>(means),
                                      silu};
        py::gil_scoped_release release;
        run(op, Stream{device, stream});
    });
}

}  // namespace

void bind_group_norm_silu(py::module_& module) {
    module.def("group_norm_silu_slice", &group_norm_silu_slice, py::kw_only(), py::arg("batch"),
               py::arg("channels"), py::arg("positions"), py::arg("groups"),
               py::arg("channels_last"), py::arg("arrays"), py::arg("dtype"),
               "The positions of a slice; 0 where a block can keep `arrays` whole groups.");
    module.def("group_norm_silu", &group_norm_silu, py::kw_only(), py::arg("x"), py::arg("weight"),
               py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("mean"),
               py::arg("rstd"), py::arg("y"), py::arg("partial"), py::arg("partial_count"),
               py::arg("batch"), py::arg("channels"), py::arg("positions"), py::arg("groups"),
               py::arg("channels_last"), py::arg("slice"), py::arg("eps"), py::arg("silu"),
               py::arg("dtype"), py::arg("device"), py::arg("stream"),
               "Writes y, and mean and rstd (batch, groups). x and y are dense, channels first or "
               "last; weight and bias (channels,) may be None. slice is 0 where a block keeps a "
               "whole group (see group_norm_silu_slice); otherwise partial is float32 (batch, "
               "ceil(positions / slice), 2, channels).");
    module.def("group_norm_silu_backward", &group_norm_silu_backward, py::kw_only(),
               py::arg("grad"), py::arg("x"), py::arg("mean"), py::arg("rstd"), py::arg("weight"),
               py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("grad_x"),
               py::arg("grad_weight"), py::arg("grad_bias"), py::arg("sums"), py::arg("partial"),
               py::arg("partial_count"), py::arg("group_means"), py::arg("batch"),
               py::arg("channels"), py::arg("positions"), py::arg("groups"),
               py::arg("channels_last"), py::arg("slice"), py::arg("silu"), py::arg("dtype"),
               py::arg("device"), py::arg("stream"),
               "Writes those of grad_x, grad_weight and grad_bias that are not None; with either "
               "of the last two, sums is float32 (2, batch, channels). With a slice, group_means "
               "is float32 (batch, groups, 2).");
}

}  // namespace rewardprop::cuda::bindings
