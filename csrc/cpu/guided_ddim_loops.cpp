// The loops of the guided DDIM step, compiled once per instruction set with REWARDPROP_ISA naming
// it (isa.h). Plain loops that the compiler vectorises; nothing here may include a
// header with shared inline functions (see math/portable.h).
#include "guided_ddim.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

namespace {

template <typename Model, bool kGuided, bool kNoise>
void forward_loop(const GuidedDDIM<Model>& step, std::int64_t begin, std::int64_t end) {
    const Model* __restrict uncond = step.uncond;
    const Model* __restrict cond = step.cond;
    const float* __restrict latents = step.latents;
    const float* __restrict noise = step.noise;
    float* __restrict out = step.out;
    const float guidance_scale = step.guidance_scale;
    const math::DDIMCoefficients k = step.coefficients;
    for (std::int64_t i = begin; i < end; ++i) {
        float eps = math::to_float(uncond[i]);
        if (kGuided) eps = math::guided(eps, math::to_float(cond[i]), guidance_scale);
        float x_prev = math::ddim_step(latents[i], eps, k);
        if (kNoise) x_prev = math::ddim_noise(x_prev, noise[i], k);
        out[i] = x_prev;
    }
}

template <typename Model>
void forward(const GuidedDDIM<Model>& step, std::int64_t begin, std::int64_t end) {
    const bool guided = step.cond != nullptr;
    const bool noise = step.noise != nullptr;
    if (guided && noise) return forward_loop<Model, true, true>(step, begin, end);
    if (guided) return forward_loop<Model, true, false>(step, begin, end);
    if (noise) return forward_loop<Model, false, true>(step, begin, end);
    return forward_loop<Model, false, false>(step, begin, end);
}

template <typename Model>
void backward(const GuidedDDIMBackward<Model>& step, std::int64_t begin, std::int64_t end) {
    const float* __restrict grad = step.grad;
    Model* __restrict grad_uncond = step.grad_uncond;
    Model* __restrict grad_cond = step.grad_cond;
    const float uncond_share = step.uncond_share;
    const float cond_share = step.cond_share;
    const math::DDIMCoefficients k = step.coefficients;
    if (grad_cond == nullptr) {
        for (std::int64_t i = begin; i < end; ++i) {
            math::store(math::ddim_step_grad_eps(grad[i], k), grad_uncond + i);
        }
        return;
    }
    for (std::int64_t i = begin; i < end; ++i) {
        const float grad_eps = math::ddim_step_grad_eps(grad[i], k);
        math::store(uncond_share * grad_eps, grad_uncond + i);
        math::store(cond_share * grad_eps, grad_cond + i);
    }
}

}  // namespace

const GuidedDDIMLoops guided_ddim_loops = {
    forward<float>,
    forward<math::BFloat16>,
    backward<float>,
    backward<math::BFloat16>,
};

}  // namespace rewardprop::cpu::REWARDPROP_ISA
