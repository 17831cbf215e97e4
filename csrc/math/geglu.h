// GEGLU (arXiv 2002.05202) for one pair, and its derivatives; gelu with the error function itself.
//
//     out         = hidden gate Φ(gate)
//     grad_hidden = grad gate Φ(gate)
//     grad_gate   = grad hidden (Φ(gate) + gate φ(gate))
#pragma once

#include "normal.h"

namespace rewardprop::math {

struct GegluGradients {
    float hidden;
    float gate;
};

REWARDPROP_FUNCTION float geglu(float hidden, float gate) {
    return hidden * (gate * normal(gate).cdf);
}

REWARDPROP_FUNCTION GegluGradients geglu_gradients(float grad, float hidden, float gate) {
    const Normal n = normal(gate);
    return {grad * (gate * n.cdf), grad * hidden * multiply_add(gate, n.density, n.cdf)};
}

}  // namespace rewardprop::math
