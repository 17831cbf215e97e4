// The loops of GEGLU, compiled once per instruction set with REWARDPROP_ISA naming it (isa.h).
// Plain loops that the compiler vectorises; nothing here may include a header with
// shared inline functions (see math/portable.h).
#include "../math/geglu.h"
#include "geglu.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

namespace {

template <typename T>
void forward_row(const T* __restrict hidden, const T* __restrict gate, T* __restrict out,
                 std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        math::store(math::geglu(math::to_float(hidden[i]), math::to_float(gate[i])), out + i);
    }
}

template <typename T>
void backward_row(const T* __restrict grad, const T* __restrict hidden, const T* __restrict gate,
                  T* __restrict grad_hidden, T* __restrict grad_gate, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const math::GegluGradients gradients = math::geglu_gradients(
            math::to_float(grad[i]), math::to_float(hidden[i]), math::to_float(gate[i]));
        math::store(gradients.hidden, grad_hidden + i);
        math::store(gradients.gate, grad_gate + i);
    }
}

template <typename T>
void forward(const Geglu<T>& op, std::int64_t begin, std::int64_t end) {
    while (begin < end) {  // a row, or what of it lies in the range
        const std::int64_t row = begin / op.width;
        const std::int64_t row_end = row * op.width + op.width;
        const std::int64_t stop = row_end < end ? row_end : end;
        // Element i of out is in row i / N, so its hidden value is N (i / N) further on in x.
        const T* hidden = op.x + begin + row * op.width;
        forward_row(hidden, hidden + op.width, op.out + begin, stop - begin);
        begin = stop;
    }
}

template <typename T>
void backward(const GegluBackward<T>& op, std::int64_t begin, std::int64_t end) {
    while (begin < end) {
        const std::int64_t row = begin / op.width;
        const std::int64_t row_end = row * op.width + op.width;
        const std::int64_t stop = row_end < end ? row_end : end;
        const std::int64_t at = begin + row * op.width;
        backward_row(op.grad + begin, op.x + at, op.x + at + op.width, op.grad_x + at,
                     op.grad_x + at + op.width, stop - begin);
        begin = stop;
    }
}

}  // namespace

const GegluLoops geglu_loops = {
    forward<float>,
    forward<math::BFloat16>,
    backward<float>,
    backward<math::BFloat16>,
};

}  // namespace rewardprop::cpu::REWARDPROP_ISA
