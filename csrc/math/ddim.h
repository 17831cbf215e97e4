// The guided DDIM step for one element, and its derivative.
//
//     eps    = u + w (c - u)              classifier-free guidance, arXiv 2207.12598
//     x_prev = a x + b eps + sigma noise  DDIM (arXiv 2010.02502, eq. 12) in its linear form
#pragma once

#include "portable.h"

namespace rewardprop::math {

struct DDIMCoefficients {
    float a;      // of the latents
    float b;      // of the noise prediction
    float sigma;  // of fresh noise
};

REWARDPROP_FUNCTION float guided(float uncond, float cond, float guidance_scale) {
    return uncond + guidance_scale * (cond - uncond);
}

REWARDPROP_FUNCTION float ddim_step(float latent, float eps, DDIMCoefficients k) {
    return k.a * latent + k.b * eps;
}

REWARDPROP_FUNCTION float ddim_noise(float x_prev, float noise, DDIMCoefficients k) {
    return x_prev + k.sigma * noise;
}

// d x_prev / d eps times the incoming gradient. The guidance splits it: (1 - w) to u, w to c.
REWARDPROP_FUNCTION float ddim_step_grad_eps(float grad, DDIMCoefficients k) { return k.b * grad; }

}  // namespace rewardprop::math
