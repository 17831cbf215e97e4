// Attention for Python (rewardprop_fast/ops/attention/native.py).
#include "../cpu/attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "operators.h"

namespace py = pybind11;

namespace rewardprop::bindings {

namespace {

constexpr std::int64_t kMaxWidth = 512;

// A tensor (B, H, L, D) as Python hands it over: its address and the strides of B, H and L in
// elements. Elements of D lie side by side.
struct Tensor {
    std::uintptr_t address;
    std::array<std::int64_t, 3> strides;
};

struct Sizes {
    std::int64_t batch, heads, queries, keys, width;
};

Sizes sizes(const std::array<std::int64_t, 5>& given) {
    const Sizes found{given[0], given[1], given[2], given[3], given[4]};
    if (found.batch < 0 || found.heads < 0 || found.queries < 0 || found.keys < 1 ||
        found.width < 1 || found.width > kMaxWidth) {
        throw std::invalid_argument(
            "sizes (B, H, Lq, Lk, D) must not be negative, Lk at least 1 and D from 1 to 512");
    }
    return found;
}

// The memory that a tensor spans, as an array to check; strides may be 0 but not negative.
Array span(const char* name, const Tensor& tensor, const Sizes& size, std::int64_t length,
           std::int64_t item_size) {
    const std::int64_t extents[3] = {size.batch, size.heads, length};
    std::int64_t last = size.width;
    bool empty = false;
    for (int i = 0; i < 3; ++i) {
        if (tensor.strides[i] < 0)
            throw std::invalid_argument(std::string(name) + " has a negative stride");
        if (extents[i] == 0) {
            empty = true;
            continue;
        }
        std::int64_t reach;
        if (__builtin_mul_overflow(extents[i] - 1, tensor.strides[i], &reach) ||
            __builtin_add_overflow(last, reach, &last) ||
            last > std::numeric_limits<std::int64_t>::max() / item_size) {
            throw std::invalid_argument(std::string(name) + " is too large");
        }
    }
    const Array array{name, tensor.address, empty ? 0 : last, item_size};
    check(array);
    return array;
}

// What is written must hold every element once.
void check_dense(const char* name, const Tensor& tensor, const Sizes& size, std::int64_t length) {
    const std::array<std::int64_t, 3> expected = {length * size.heads * size.width, size.width,
                                                  size.heads * size.width};
    if (size.batch * size.heads * length > 0 && tensor.strides != expected)
        throw std::invalid_argument(std::string(name) + " must be laid out as (B, L, H, D)");
}

template <typename T>
cpu::Rows<T> rows(const Tensor& tensor) {
    return {reinterpret_cast<T*>(tensor.address), tensor.strides[0], tensor.strides[1],
            tensor.strides[2]};
}

Tensor tensor(std::uintptr_t address, const std::array<std::int64_t, 3>& strides) {
    return {address, strides};
}

using Given = std::pair<std::uintptr_t, std::array<std::int64_t, 3>>;

Tensor tensor(const Given& given) { return tensor(given.first, given.second); }

template <typename T>
void forward(const Sizes& size, const Tensor& q, const Tensor& k, const Tensor& v,
             const Tensor& out, const Array& lse, double scale) {
    const cpu::Attention<T> op{rows<const T>(q), rows<const T>(k),
                               rows<const T>(v), rows<T>(out),
                               lse.as<float>(),  size.heads,
                               size.queries,     size.keys,
                               size.width,       static_cast<float>(scale)};
    py::gil_scoped_release release;
    cpu::run(op, size.batch);
}

void attention(const std::array<std::int64_t, 5>& given_sizes, const std::string& dtype,
               const Given& q, const Given& k, const Given& v, const Given& out,
               std::uintptr_t lse_address, double scale) {
    const Sizes size = sizes(given_sizes);
    const std::int64_t item = item_size("dtype", dtype);
    const Array q_array = span("q", tensor(q), size, size.queries, item);
    const Array k_array = span("k", tensor(k), size, size.keys, item);
    const Array v_array = span("v", tensor(v), size, size.keys, item);
    const Array out_array = span("out", tensor(out), size, size.queries, item);
    const Array lse{"lse", lse_address, size.batch * size.heads * size.queries, sizeof(float)};
    check(lse);
    check_dense("out", tensor(out), size, size.queries);
    for (const Array* array : {&q_array, &k_array, &v_array}) {
        check_apart(out_array, *array);
        check_apart(lse, *array);
    }
    check_apart(out_array, lse);
    const auto run = dtype == "float32" ? forward<float> : forward<math::BFloat16>;
    run(size, tensor(q), tensor(k), tensor(v), tensor(out), lse, scale);
}

template <typename T>
cpu::Rows<T> rows_or_null(const std::optional<Given>& given) {
    return given ? rows<T>(tensor(*given)) : cpu::Rows<T>{};
}

template <typename T>
void backward(const Sizes& size, const std::array<Given, 5>& read, const Array& lse,
              const std::array<std::optional<Given>, 3>& written, double scale) {
    const cpu::AttentionBackward<T> op{rows<const T>(tensor(read[0])),
                                       rows<const T>(tensor(read[1])),
                                       rows<const T>(tensor(read[2])),
                                       rows<const T>(tensor(read[3])),
                                       rows<const T>(tensor(read[4])),
                                       lse.as<const float>(),
                                       rows_or_null<T>(written[0]),
                                       rows_or_null<T>(written[1]),
                                       rows_or_null<T>(written[2]),
                                       size.heads,
                                       size.queries,
                                       size.keys,
                                       size.width,
                                       static_cast<float>(scale)};
    py::gil_scoped_release release;
    cpu::run(op, size.batch);
}

void attention_backward(const std::array<std::int64_t, 5>& given_sizes, const std::string& dtype,
                        const Given& grad, const Given& q, const Given& k, const Given& v,
                        const Given& out, std::uintptr_t lse_address,
                        const std::optional<Given>& dq, const std::optional<Given>& dk,
                        const std::optional<Given>& dv, double scale) {
    const Sizes size = sizes(given_sizes);
    const std::int64_t item = item_size("dtype", dtype);
    std::vector<Array> read = {
        span("grad", tensor(grad), size, size.queries, item),
        span("q", tensor(q), size, size.queries, item),
        span("k", tensor(k), size, size.keys, item),
        span("v", tensor(v), size, size.keys, item),
        span("out", tensor(out), size, size.queries, item),
        {"lse", lse_address, size.batch * size.heads * size.queries, sizeof(float)},
    };
    const Array lse = read.back();
    check(lse);
    const std::array<std::optional<Given>, 3> written = {dq, dk, dv};
    const char* const names[3] = {"dq", "dk", "dv"};
    for (int i = 0; i < 3; ++i) {
        if (!written[i]) continue;
        const std::int64_t length = i == 0 ? size.queries : size.keys;
        const Array array = span(names[i], tensor(*written[i]), size, length, item);
        check_dense(names[i], tensor(*written[i]), size, length);
        for (const Array& other : read) check_apart(array, other);
        read.push_back(array);  // nor may the results overlap each other
    }
    const auto run = dtype == "float32" ? backward<float> : backward<math::BFloat16>;
    run(size, {grad, q, k, v, out}, lse, written, scale);
}

}  // namespace

void bind_attention(py::module_& module) {
    module.def("attention", &attention, py::kw_only(), py::arg("sizes"), py::arg("dtype"),
               py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
               py::arg("scale"),
               "Writes O and LSE. sizes are (B, H, Lq, Lk, D); tensors are pairs of an address and "
               "the strides of B, H and L.");
    module.def("attention_backward", &attention_backward, py::kw_only(), py::arg("sizes"),
               py::arg("dtype"), py::arg("grad"), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("out"), py::arg("lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
               py::arg("scale"), "Writes the gradients that are not None.");
}

}  // namespace rewardprop::bindings
