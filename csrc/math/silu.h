// SiLU (arXiv 1702.03118), z sigmoid(z), and its derivative, as PyTorch rounds them.
#pragma once

#include "exp.h"

namespace rewardprop::math {

REWARDPROP_FUNCTION float silu(float z) { return z / (1.0f + exp(-z)); }

// d silu(z) / dz = s (1 + z (1 - s)), s = sigmoid(z).
REWARDPROP_FUNCTION float silu_slope(float z) {
    const float s = 1.0f / (1.0f + exp(-z));
    return s * multiply_add(z, 1.0f - s, 1.0f);
}

}  // namespace rewardprop::math
