// The guided DDIM step on a GPU, over flat arrays; Model is float, math::BFloat16 or math::Half.
#pragma once

#include <cstdint>

#include "stream.h"

namespace rewardprop::cuda {

// x_prev[i] from latents[i], the model's output and noise[i].
template <typename Model>
struct GuidedDDIM {
    const Model* uncond;  // the whole output where there is no guidance
    const Model* cond;    // null where there is no guidance
    const float* latents;
    const float* noise;         // may be null
    const float* coefficients;  // a, b, sigma: on the device, so that a graph can be replayed
    float* out;
    float guidance_scale;
    std::int64_t count;
};

// The gradients of uncond and cond from that of x_prev.
template <typename Model>
struct GuidedDDIMBackward {
    const float* grad;
    const float* coefficients;
    Model* grad_uncond;
    Model* grad_cond;  // null where there is no guidance
    float uncond_share;
    float cond_share;
    std::int64_t count;
};

template <typename Model>
void run(const GuidedDDIM<Model>& step, Stream stream);
template <typename Model>
void run(const GuidedDDIMBackward<Model>& step, Stream stream);

}  // namespace rewardprop::cuda
