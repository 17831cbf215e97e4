// GEGLU over packed rows: x holds M rows of N hidden and N gate values, out = hidden * gelu(gate).
#pragma once

#include <cstdint>

#include "../math/bf16.h"

namespace rewardprop::cpu {

template <typename T>
struct Geglu {
    const T* x;          // (M, 2N)
    T* out;              // (M, N)
    std::int64_t width;  // N
};

// The gradient of x, packed as x is, from that of out.
template <typename T>
struct GegluBackward {
    const T* grad;       // (M, N)
    const T* x;          // (M, 2N)
    T* grad_x;           // (M, 2N)
    std::int64_t width;  // N
};

// One instruction set's loops over the elements [begin, end) of out.
struct GegluLoops {
    void (*forward_f32)(const Geglu<float>&, std::int64_t begin, std::int64_t end);
    void (*forward_bf16)(const Geglu<math::BFloat16>&, std::int64_t begin, std::int64_t end);
    void (*backward_f32)(const GegluBackward<float>&, std::int64_t begin, std::int64_t end);
    void (*backward_bf16)(const GegluBackward<math::BFloat16>&, std::int64_t begin,
                          std::int64_t end);
};

// geglu_loops.cpp is compiled once per instruction set and defines one of these each time.
namespace scalar {
extern const GegluLoops geglu_loops;
}
namespace avx2 {
extern const GegluLoops geglu_loops;
}
namespace avx512 {
extern const GegluLoops geglu_loops;
}
namespace avx512_bf16 {
extern const GegluLoops geglu_loops;
}
namespace amx {
extern const GegluLoops geglu_loops;
}

// On the selected instruction set and the OpenMP pool; `count` is M N.
void run(const Geglu<float>& op, std::int64_t count);
void run(const Geglu<math::BFloat16>& op, std::int64_t count);
void run(const GegluBackward<float>& op, std::int64_t count);
void run(const GegluBackward<math::BFloat16>& op, std::int64_t count);

}  // namespace rewardprop::cpu
