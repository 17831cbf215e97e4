// The guided DDIM step over flat float arrays; the network's output may be float or bfloat16.
#pragma once

#include <cstdint>

#include "../math/bf16.h"
#include "../math/ddim.h"

namespace rewardprop::cpu {

// x_prev[i] from latents[i], the model's output and noise[i].
template <typename Model>
struct GuidedDDIM {
    const Model* uncond;  // the whole output where there is no guidance
    const Model* cond;    // null where there is no guidance
    const float* latents;
    const float* noise;  // may be null
    float* out;
    float guidance_scale;
    math::DDIMCoefficients coefficients;
};

// The gradients of uncond and cond from that of x_prev.
template <typename Model>
struct GuidedDDIMBackward {
    const float* grad;
    Model* grad_uncond;
    Model* grad_cond;  // null where there is no guidance
    float uncond_share;
    float cond_share;
    math::DDIMCoefficients coefficients;
};

// One instruction set's loops over the elements [begin, end).
struct GuidedDDIMLoops {
    void (*forward_f32)(const GuidedDDIM<float>&, std::int64_t begin, std::int64_t end);
    void (*forward_bf16)(const GuidedDDIM<math::BFloat16>&, std::int64_t begin, std::int64_t end);
    void (*backward_f32)(const GuidedDDIMBackward<float>&, std::int64_t begin, std::int64_t end);
    void (*backward_bf16)(const GuidedDDIMBackward<math::BFloat16>&, std::int64_t begin,
                          std::int64_t end);
};

// guided_ddim_loops.cpp is compiled once per instruction set and defines one of these each time.
namespace scalar {
extern const GuidedDDIMLoops guided_ddim_loops;
}
namespace avx2 {
extern const GuidedDDIMLoops guided_ddim_loops;
}
namespace avx512 {
extern const GuidedDDIMLoops guided_ddim_loops;
}
namespace avx512_bf16 {
extern const GuidedDDIMLoops guided_ddim_loops;
}
namespace amx {
extern const GuidedDDIMLoops guided_ddim_loops;
}

// On the selected instruction set and the OpenMP pool. Overloads, so that callers can be templates.
void run(const GuidedDDIM<float>& step, std::int64_t count);
void run(const GuidedDDIM<math::BFloat16>& step, std::int64_t count);
void run(const GuidedDDIMBackward<float>& step, std::int64_t count);
void run(const GuidedDDIMBackward<math::BFloat16>& step, std::int64_t count);

}  // namespace rewardprop::cpu
