// GEGLU for Python (rewardprop_fast/ops/geglu/cuda.py).
#include "../geglu.h"

#include <pybind11/pybind11.h>

#include <cstdint>
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
using rewardprop::bindings::count_of;

void geglu(std::uintptr_t x_address, std::uintptr_t out_address, std::int64_t rows,
           std::int64_t width, const std::string& dtype, int device, std::uintptr_t stream) {
    with_type("dtype", dtype, [&](auto element) {
        using T = decltype(element);
        const std::int64_t count = count_of(rows, width);
        const Array x{"x", x_address, 2 * count, sizeof(T)};
        const Array out{"out", out_address, count, sizeof(T)};
        for (const Array* array : {&x, &out}) check(*array);
        check_apart(out, x);

        const Geglu<T> op{x.as<const T>(), out.as<T>(), rows, width};
        py::gil_scoped_release release;
        run(op, Stream{device, stream});
    });
}

void geglu_backward(std::uintptr_t grad_address, std::uintptr_t x_address,
                    std::uintptr_t grad_x_address, std::int64_t rows, std::int64_t width,
                    const std::string& dtype, int device, std::uintptr_t stream) {
    with_type("dtype", dtype, [&](auto element) {
        using T = decltype(element);
        const std::int64_t count = count_of(rows, width);
        const Array grad{"grad", grad_address, count, sizeof(T)};
        const Array x{"x", x_address, 2 * count, sizeof(T)};
        const Array grad_x{"grad_x", grad_x_address, 2 * count, sizeof(T)};
        for (const Array* array : {&grad, &x, &grad_x}) check(*array);
        check_apart(grad_x, grad);
        check_apart(grad_x, x);

        const GegluBackward<T> op{grad.as<const T>(), x.as<const T>(), grad_x.as<T>(), rows, width};
        py::gil_scoped_release release;
        run(op, Stream{device, stream});
    });
}

}  // namespace

void bind_geglu(py::module_& module) {
    module.def("geglu", &geglu, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("rows"),
               py::arg("width"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
               "Writes hidden * gelu(gate) of x (rows, 2 width) to out (rows, width), both dense.");
    module.def("geglu_backward", &geglu_backward, py::kw_only(), py::arg("grad"), py::arg("x"),
               py::arg("grad_x"), py::arg("rows"), py::arg("width"), py::arg("dtype"),
               py::arg("device"), py::arg("stream"),
               "Writes the gradient of x (rows, 2 width) to grad_x; grad is that of out.");
}

}  // namespace rewardprop::cuda::bindings
