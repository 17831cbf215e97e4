// The standard normal distribution, as GELU needs it: in single precision, without a branch, so
// that loops over it vectorise.
//
//     Φ(x)  = P(N(0, 1) <= x) = (1 + erf(x / √2)) / 2
//     Φ(-t) = e^(-t²/2) R(t), R(t) = erfcx(t / √2) / 2, t >= 0
//
// R falls smoothly from 1/2 towards 1 / (t √(2π)): a polynomial in u = (t - 3) / (t + 3) gives it
// to 7e-9 of its value over the whole range. So both tails have relative precision, where
// 1 + erf(x / √2) loses all digits on the left, and the density comes from the same exponential.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace rewardprop::math {

struct Normal {
    float cdf;      // Φ(x)
    float density;  // φ(x) = e^(-x²/2) / √(2π)
};

// Beyond this e^(-t²/2) is no normal number; Φ(-t) < 1e-39 counts as zero.
constexpr float kNormalTail = 13.2f;

// 2^y for -126 <= y <= 0, to 2e-9 and the rounding of y: e^x is 2^(x / ln 2).
REWARDPROP_FUNCTION float exp2_of_negative(float y) {
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float shifted = y + kToInteger;
    const float f = y - (shifted - kToInteger);  // exact, in [-1/2, 1/2]
    float p = 1.53533401e-4f;
    p = multiply_add(p, f, 1.33989006e-3f);
    p = multiply_add(p, f, 9.61843785e-3f);
    p = multiply_add(p, f, 5.55033237e-2f);
    p = multiply_add(p, f, 2.40226477e-1f);
    p = multiply_add(p, f, 6.93147182e-1f);
    p = multiply_add(p, f, 1.0f);
    std::uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127u) << 23;  // the whole number, in the low bits of `shifted`, as an exponent
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power;
}

// Φ(x) and φ(x). At ±infinity 0 or 1, and 0; at NaN zeros, so what multiplies by x must say NaN.
REWARDPROP_FUNCTION Normal normal(float x) {
    constexpr float kHalfLog2E = 0.721347520f;
    constexpr float kDensityAtZero = 0.398942280f;  // 1 / √(2π)
    const float t = __builtin_fabsf(x);
    const float u = 1.0f - 6.0f / (t + 3.0f);
    float r = 5.41510271e-5f;
    r = multiply_add(r, u, 1.16037627e-4f);
    r = multiply_add(r, u, -3.39911436e-4f);
    r = multiply_add(r, u, -9.84183047e-4f);
    r = multiply_add(r, u, 2.90470268e-3f);
    r = multiply_add(r, u, 6.13218313e-3f);
    r = multiply_add(r, u, -4.62133139e-2f);
    r = multiply_add(r, u, 1.23225018e-1f);
    r = multiply_add(r, u, -2.06402615e-1f);
    r = multiply_add(r, u, 1.21513948e-1f);
    const float gaussian = exp2_of_negative(-kHalfLog2E * (x * x));
    const float e = t < kNormalTail ? gaussian : 0.0f;
    const float tail = e * r;
    return {x < 0.0f ? tail : 1.0f - tail, kDensityAtZero * e};
}

}  // namespace rewardprop::math
