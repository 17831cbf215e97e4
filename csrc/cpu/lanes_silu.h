// SiLU and its slope (math/silu.h) on lanes, each in two precisions: `Exact` is single precision,
// `Short` is for what is rounded to bfloat16 next, off by at most 2^-12 of the sigmoid, where that
// rounding takes up to 2^-8.
//
// AVX-512 has what makes both short: an instruction that multiplies by a power of two and knows
// where that overflows, one that reads a table of sixteen numbers from a register, which leaves a
// polynomial of degree 3, and an approximate reciprocal, which one Newton step brings to single
// precision. A division alone takes half as long as all of this. The other instruction sets compute
// both precisions as math/silu.h does, AVX2 eight numbers at a time.
#pragma once

#include "../math/silu.h"
#include "lanes.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

struct Exact {};
struct Short {};

#if defined(__AVX512F__)

// 1 + e^-z, to 1.6 units in the last place; infinite where e^-z is. Of a NaN it is a number: what
// it is multiplied with is a NaN then.
REWARDPROP_LANES __m512 one_plus_exponential(__m512 z, Exact) {
    const __m512 powers = _mm512_setr_ps(  // 2^(i / 16)
        1.0f, 1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
        1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903319f,
        1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f);
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 to_sixteenths = _mm512_set1_ps(786432.0f);  // 1.5 * 2^19: adding it rounds to 1/16
    // Beyond 104 the exponential is nothing beside 1, or infinite: the smaller absolute value, with
    // the sign of z.
    z = _mm512_range_ps(z, _mm512_set1_ps(104.0f), 2);
    const __m512 shifted = _mm512_fmadd_ps(z, _mm512_set1_ps(-1.44269504f), to_sixteenths);
    const __m512 n = shifted - to_sixteenths;
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(0.693145752f), z);  // as in math/exp.h
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    // e^-z = 2^n e^-r, and e^-r = 1 - r p(r) to 3e-9 for |r| <= ln(2) / 32.
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.16666667f), _mm512_set1_ps(-0.50001496f));
    p = _mm512_fmadd_ps(p, r, one);
    // The sixteenths of n are the lowest bits of `shifted`; scalef takes the whole part of n.
    const __m512 power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), powers);
    return one + _mm512_scalef_ps(_mm512_fnmadd_ps(power * r, p, power), n);
}

// The same to 8e-5 of e^-z: a polynomial for 2^f, 0 <= f < 1.
REWARDPROP_LANES __m512 one_plus_exponential(__m512 z, Short) {
    constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m512 t = z * _mm512_set1_ps(-1.44269504f);
    const __m512 f = _mm512_reduce_ps(t, kDown);  // zero at the infinities
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.07802452f), _mm512_set1_ps(0.22606716f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583354f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
    return _mm512_set1_ps(1.0f) + _mm512_scalef_ps(p, t);
}

// 1 / d for d >= 1; zero at infinity.
REWARDPROP_LANES __m512 reciprocal(__m512 d, Exact) {
    const __m512 r = _mm512_rcp14_ps(d);
    // At infinity r is zero and stays it, if what it is multiplied with is finite.
    const __m512 finite = _mm512_min_ps(_mm512_set1_ps(__FLT_MAX__), d);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(finite, r, _mm512_set1_ps(1.0f)), r);
}

REWARDPROP_LANES __m512 reciprocal(__m512 d, Short) { return _mm512_rcp14_ps(d); }

template <typename Precision>
REWARDPROP_LANES __m512 sigmoid(__m512 z, Precision precision) {
    return reciprocal(one_plus_exponential(z, precision), precision);
}

template <typename Precision>
REWARDPROP_LANES __m512 silu_slope(__m512 z, Precision precision) {
    const __m512 one = _mm512_set1_ps(1.0f), s = sigmoid(z, precision);
    return s * _mm512_fmadd_ps(z, one - s, one);
}

template <typename Precision>
REWARDPROP_LANES Lanes silu(Lanes z, Precision precision) {
    return {z.low * sigmoid(z.low, precision), z.high * sigmoid(z.high, precision)};
}

template <typename Precision>
REWARDPROP_LANES Lanes silu_slope(Lanes z, Precision precision) {
    return {silu_slope(z.low, precision), silu_slope(z.high, precision)};
}

#elif defined(__AVX2__)

// 1 + e^-z, as math/exp.h has it.
REWARDPROP_LANES __m256 one_plus_exponential(__m256 z) {
    const auto all = [](float value) { return _mm256_set1_ps(value); };
    const __m256 x = _mm256_xor_ps(z, all(-0.0f));
    const __m256 to_integer = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const __m256 shifted = _mm256_fmadd_ps(x, all(1.44269504f), to_integer);
    const __m256 n = shifted - to_integer;
    __m256 r = _mm256_fnmadd_ps(n, all(0.693145752f), x);
    r = _mm256_fnmadd_ps(n, all(1.42860677e-6f), r);
    __m256 p = all(1.384483767e-3f);
    p = _mm256_fmadd_ps(p, r, all(8.374216398e-3f));
    p = _mm256_fmadd_ps(p, r, all(4.166798196e-2f));
    p = _mm256_fmadd_ps(p, r, all(1.666643051e-1f));
    p = _mm256_fmadd_ps(p, r, all(4.999999429e-1f));
    p = _mm256_fmadd_ps(p, r, all(1.0f));
    p = _mm256_fmadd_ps(p, r, all(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    power = _mm256_andnot_ps(_mm256_cmp_ps(x, all(-87.3365402f), _CMP_LT_OQ), power);
    const __m256 finite = _mm256_cmp_ps(x, all(88.7228317f), _CMP_LE_OQ);
    return all(1.0f) + _mm256_blendv_ps(x + all(__builtin_inff()), power, finite);
}

REWARDPROP_LANES __m256 silu_slope(__m256 z) {
    const __m256 one = _mm256_set1_ps(1.0f), s = one / one_plus_exponential(z);
    return s * _mm256_fmadd_ps(z, one - s, one);
}

template <typename Precision>
REWARDPROP_LANES Lanes silu(Lanes z, Precision) {
    return {z.low / one_plus_exponential(z.low), z.high / one_plus_exponential(z.high)};
}

template <typename Precision>
REWARDPROP_LANES Lanes silu_slope(Lanes z, Precision) {
    return {silu_slope(z.low), silu_slope(z.high)};
}

#else

template <typename Precision>
REWARDPROP_LANES float silu(float z, Precision) {
    return math::silu(z);
}

template <typename Precision>
REWARDPROP_LANES float silu_slope(float z, Precision) {
    return math::silu_slope(z);
}

#endif

}  // namespace rewardprop::cpu::REWARDPROP_ISA
