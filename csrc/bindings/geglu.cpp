// GEGLU for Python (rewardprop_fast/ops/geglu/native.py).
#include "../cpu/geglu.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "arrays.h"
#include "operators.h"

namespace py = pybind11;

namespace rewardprop::bindings {

namespace {

template <typename T>
void forward(const Array& x, const Array& out, std::int64_t width) {
    const cpu::Geglu<T> op{x.as<const T>(), out.as<T>(), width};
    py::gil_scoped_release release;
    cpu::run(op, out.count);
}

template <typename T>
void backward(const Array& grad, const Array& x, const Array& grad_x, std::int64_t width) {
    const cpu::GegluBackward<T> op{grad.as<const T>(), x.as<const T>(), grad_x.as<T>(), width};
    py::gil_scoped_release release;
    cpu::run(op, grad.count);
}

void geglu(std::uintptr_t x_address, std::uintptr_t out_address, std::int64_t rows,
           std::int64_t width, const std::string& dtype) {
    const std::int64_t size = item_size("dtype", dtype);
    const std::int64_t count = count_of(rows, width);
    const Array x{"x", x_address, 2 * count, size};
    const Array out{"out", out_address, count, size};
    for (const Array* array : {&x, &out}) check(*array);
    check_apart(out, x);

    const auto run = dtype == "float32" ? forward<float> : forward<math::BFloat16>;
    run(x, out, width);
}

void geglu_backward(std::uintptr_t grad_address, std::uintptr_t x_address,
                    std::uintptr_t grad_x_address, std::int64_t rows, std::int64_t width,
                    const std::string& dtype) {
    const std::int64_t size = item_size("dtype", dtype);
    const std::int64_t count = count_of(rows, width);
    const Array grad{"grad", grad_address, count, size};
    const Array x{"x", x_address, 2 * count, size};
    const Array grad_x{"grad_x", grad_x_address, 2 * count, size};
    for (const Array* array : {&grad, &x, &grad_x}) check(*array);
    check_apart(grad_x, grad);
    check_apart(grad_x, x);

    const auto run = dtype == "float32" ? backward<float> : backward<math::BFloat16>;
    run(grad, x, grad_x, width);
}

}  // namespace

void bind_geglu(py::module_& module) {
    module.def("geglu", &geglu, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("rows"),
               py::arg("width"), py::arg("dtype"),
               "Writes hidden * gelu(gate) of x (rows, 2 width) to out (rows, width), both dense.");
    module.def("geglu_backward", &geglu_backward, py::kw_only(), py::arg("grad"), py::arg("x"),
               py::arg("grad_x"), py::arg("rows"), py::arg("width"), py::arg("dtype"),
               "Writes the gradient of x (rows, 2 width) to grad_x; grad is that of out.");
}

}  // namespace rewardprop::bindings
