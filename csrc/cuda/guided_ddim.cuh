// The kernels of the guided DDIM step: every thread takes N neighbouring elements.
#pragma once

#include "../math/bf16.h"
#include "../math/ddim.h"
#include "../math/fp16.h"
#include "elementwise.h"
#include "guided_ddim.h"
#include "platform.cuh"

namespace rewardprop::cuda {

template <typename Model, int N>
__global__ void __launch_bounds__(kElementwiseThreads)
    guided_ddim_kernel(const GuidedDDIM<Model> step) {
    const std::int64_t at =
        (static_cast<std::int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * N;
    if (at >= step.count) return;
    const math::DDIMCoefficients k{step.coefficients[0], step.coefficients[1],
                                   step.coefficients[2]};
    const Pack<Model, N> uncond = load_pack<N>(step.uncond + at);
    const Pack<float, N> latents = load_pack<N>(step.latents + at);
    Pack<Model, N> cond = uncond;
    if (step.cond != nullptr) cond = load_pack<N>(step.cond + at);
    Pack<float, N> noise = latents;
    if (step.noise != nullptr) noise = load_pack<N>(step.noise + at);
    Pack<float, N> out;
    for (int i = 0; i < N; ++i) {
        float eps = math::to_float(uncond.values[i]);
        if (step.cond != nullptr)
            eps = math::guided(eps, math::to_float(cond.values[i]), step.guidance_scale);
        float x_prev = math::ddim_step(latents.values[i], eps, k);
        if (step.noise != nullptr) x_prev = math::ddim_noise(x_prev, noise.values[i], k);
        out.values[i] = x_prev;
    }
    store_pack(out, step.out + at);
}

template <typename Model, int N>
__global__ void __launch_bounds__(kElementwiseThreads)
    guided_ddim_backward_kernel(const GuidedDDIMBackward<Model> step) {
    const std::int64_t at =
        (static_cast<std::int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * N;
    if (at >= step.count) return;
    const math::DDIMCoefficients k{step.coefficients[0], step.coefficients[1],
                                   step.coefficients[2]};
    const Pack<float, N> grad = load_pack<N>(step.grad + at);
    Pack<Model, N> uncond;
    Pack<Model, N> cond;
    const bool guided = step.grad_cond != nullptr;
    for (int i = 0; i < N; ++i) {
        const float grad_eps = math::ddim_step_grad_eps(grad.values[i], k);
        math::store(guided ? step.uncond_share * grad_eps : grad_eps, &uncond.values[i]);
        math::store(step.cond_share * grad_eps, &cond.values[i]);
    }
    store_pack(uncond, step.grad_uncond + at);
    if (guided) store_pack(cond, step.grad_cond + at);
}

}  // namespace rewardprop::cuda
