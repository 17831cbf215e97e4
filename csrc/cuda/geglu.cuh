// The kernels of GEGLU: every thread takes N neighbouring elements of a row of out.
#pragma once

#include "../math/bf16.h"
#include "../math/fp16.h"
#include "../math/geglu.h"
#include "elementwise.h"
#include "geglu.h"
#include "platform.cuh"

namespace rewardprop::cuda {

// Where this thread's elements lie in out; their hidden values lie `row width` further on in x. N
// divides the width, so that a pack lies in one row.
struct GegluPlace {
    std::int64_t out;
    std::int64_t hidden;
};

template <int N>
__device__ __forceinline__ GegluPlace geglu_place(std::int64_t width) {
    const std::int64_t pack =
        static_cast<std::int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x;
    const std::int64_t packs_in_row = width / N;
    return {pack * N, pack * N + divide(pack, packs_in_row) * width};
}

template <typename T, int N>
__global__ void __launch_bounds__(kElementwiseThreads) geglu_kernel(const Geglu<T> op) {
    const GegluPlace at = geglu_place<N>(op.width);
    if (at.out >= op.rows * op.width) return;
    const Pack<T, N> hidden = load_pack<N>(op.x + at.hidden);
    const Pack<T, N> gate = load_pack<N>(op.x + at.hidden + op.width);
    Pack<T, N> out;
    for (int i = 0; i < N; ++i) {
        math::store(math::geglu(math::to_float(hidden.values[i]), math::to_float(gate.values[i])),
                    &out.values[i]);
    }
    store_pack(out, op.out + at.out);
}

template <typename T, int N>
__global__ void __launch_bounds__(kElementwiseThreads)
    geglu_backward_kernel(const GegluBackward<T> op) {
    const GegluPlace at = geglu_place<N>(op.width);
    if (at.out >= op.rows * op.width) return;
    const Pack<T, N> grad = load_pack<N>(op.grad + at.out);
    const Pack<T, N> hidden = load_pack<N>(op.x + at.hidden);
    const Pack<T, N> gate = load_pack<N>(op.x + at.hidden + op.width);
    Pack<T, N> grad_hidden;
    Pack<T, N> grad_gate;
    for (int i = 0; i < N; ++i) {
        const math::GegluGradients gradients =
            math::geglu_gradients(math::to_float(grad.values[i]), math::to_float(hidden.values[i]),
                                  math::to_float(gate.values[i]));
        math::store(gradients.hidden, &grad_hidden.values[i]);
        math::store(gradients.gate, &grad_gate.values[i]);
    }
    store_pack(grad_hidden, op.grad_x + at.hidden);
    store_pack(grad_gate, op.grad_x + at.hidden + op.width);
}

}  // namespace rewardprop::cuda
