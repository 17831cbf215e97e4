// What a loop over columns works on at a time, in the instruction set that the file is compiled
// for. With AVX-512 that is 32 floats in two registers, with AVX2 16 of them, so that two make one
// store of bfloat16; elsewhere one float. (Left to the compiler, bodies with a loop over rows
// inside would be scalar code.) One body serves all: it is called with `Whole`, or with `Part` for
// the last columns, which knows how many there are. Everything is `static` for the reason given in
// math/portable.h.
#pragma once

#include <cstdint>

#include "../math/bf16.h"

#if defined(__AVX2__)
#include <cstring>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// Called out of line, these would pass their lanes through memory.
#define REWARDPROP_INLINE inline __attribute__((always_inline))
#define REWARDPROP_LANES static REWARDPROP_INLINE

namespace rewardprop::cpu::REWARDPROP_ISA {

#if defined(__AVX512F__)

constexpr std::int64_t kLanes = 32;

struct Lanes {
    __m512 low, high;
};

REWARDPROP_LANES Lanes broadcast(float value) {
    return {_mm512_set1_ps(value), _mm512_set1_ps(value)};
}
REWARDPROP_LANES Lanes operator+(Lanes a, Lanes b) { return {a.low + b.low, a.high + b.high}; }
REWARDPROP_LANES Lanes operator-(Lanes a, Lanes b) { return {a.low - b.low, a.high - b.high}; }
REWARDPROP_LANES Lanes operator*(Lanes a, Lanes b) { return {a.low * b.low, a.high * b.high}; }
REWARDPROP_LANES Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
}

REWARDPROP_LANES __m512 to_float(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 32 floats as bfloat16, rounded to nearest, ties to even; a NaN stays a NaN.
REWARDPROP_LANES __m512i to_bfloat16(Lanes value) {
#if defined(__AVX512BF16__)
    // The same but for numbers below 2^-126, which become zero.
    return (__m512i)_mm512_cvtne2ps_pbh(value.high, value.low);
#else
    const __m512i last = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7FFF);
    const auto rounded = [&](__m512 single) {
        const __m512i bits = _mm512_castps_si512(single);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), last);
        const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, half));
        const __mmask16 nan = _mm512_cmp_ps_mask(single, single, _CMP_UNORD_Q);
        return _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7FC00000));
    };
    const __m512i upper_halves =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,  //
                         31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(rounded(value.low), upper_halves, rounded(value.high));
#endif
}

struct Whole {
    REWARDPROP_INLINE Lanes load(const float* from) const {
        return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)};
    }
    REWARDPROP_INLINE Lanes load(const math::BFloat16* from) const {
        const auto* halves = reinterpret_cast<const __m256i*>(from);
        return {to_float(_mm256_loadu_si256(halves)), to_float(_mm256_loadu_si256(halves + 1))};
    }
    REWARDPROP_INLINE void store(Lanes value, float* to) const {
        _mm512_storeu_ps(to, value.low);
        _mm512_storeu_ps(to + 16, value.high);
    }
    REWARDPROP_INLINE void store(Lanes value, math::BFloat16* to) const {
        _mm512_storeu_si512(to, to_bfloat16(value));
    }
};

// The first `count` < 32 lanes; the others are read as zero and not written.
struct Part {
    REWARDPROP_INLINE explicit Part(std::int64_t count)
        : mask((1u << count) - 1u),
          low(static_cast<__mmask16>(mask)),
          high(static_cast<__mmask16>(mask >> 16)) {}
    REWARDPROP_INLINE Lanes load(const float* from) const {
        return {_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + 16)};
    }
    REWARDPROP_INLINE Lanes load(const math::BFloat16* from) const {
        const __m512i bits = _mm512_maskz_loadu_epi16(mask, from);
        return {to_float(_mm512_castsi512_si256(bits)),
                to_float(_mm512_extracti64x4_epi64(bits, 1))};
    }
    REWARDPROP_INLINE void store(Lanes value, float* to) const {
        _mm512_mask_storeu_ps(to, low, value.low);
        _mm512_mask_storeu_ps(to + 16, high, value.high);
    }
    REWARDPROP_INLINE void store(Lanes value, math::BFloat16* to) const {
        _mm512_mask_storeu_epi16(to, mask, to_bfloat16(value));
    }
    std::uint32_t mask;
    __mmask16 low, high;
};

#elif defined(__AVX2__)

constexpr std::int64_t kLanes = 16;

struct Lanes {
    __m256 low, high;
};

REWARDPROP_LANES Lanes broadcast(float value) {
    return {_mm256_set1_ps(value), _mm256_set1_ps(value)};
}
REWARDPROP_LANES Lanes operator+(Lanes a, Lanes b) { return {a.low + b.low, a.high + b.high}; }
REWARDPROP_LANES Lanes operator-(Lanes a, Lanes b) { return {a.low - b.low, a.high - b.high}; }
REWARDPROP_LANES Lanes operator*(Lanes a, Lanes b) { return {a.low * b.low, a.high * b.high}; }
REWARDPROP_LANES Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

REWARDPROP_LANES __m256 to_float(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// 16 floats as bfloat16, rounded to nearest, ties to even; a NaN stays a NaN.
REWARDPROP_LANES __m256i to_bfloat16(Lanes value) {
    const __m256i last = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7FFF);
    const auto rounded = [&](__m256 single) __attribute__((always_inline)) {
        const __m256i bits = _mm256_castps_si256(single);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), last);
        const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, half));
        const __m256 nan = _mm256_cmp_ps(single, single, _CMP_UNORD_Q);
        const __m256 kept = _mm256_blendv_ps(
            _mm256_castsi256_ps(sum), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), nan);
        return _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    };
    // Packing works on halves of a register: its quarters come out as 0, 2, 1, 3.
    const __m256i packed = _mm256_packus_epi32(rounded(value.low), rounded(value.high));
    return _mm256_permute4x64_epi64(packed, 0xD8);
}

struct Whole {
    REWARDPROP_INLINE Lanes load(const float* from) const {
        return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    }
    REWARDPROP_INLINE Lanes load(const math::BFloat16* from) const {
        const auto* halves = reinterpret_cast<const __m128i*>(from);
        return {to_float(_mm_loadu_si128(halves)), to_float(_mm_loadu_si128(halves + 1))};
    }
    REWARDPROP_INLINE void store(Lanes value, float* to) const {
        _mm256_storeu_ps(to, value.low);
        _mm256_storeu_ps(to + 8, value.high);
    }
    REWARDPROP_INLINE void store(Lanes value, math::BFloat16* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value));
    }
};

// The first `count` < 16 lanes; the others are read as zero and not written. AVX2 has no masks for
// bfloat16: it goes through a buffer.
struct Part {
    REWARDPROP_INLINE explicit Part(std::int64_t count)
        : count(count), low(first(count)), high(first(count - 8)) {}
    REWARDPROP_INLINE Lanes load(const float* from) const {
        return {_mm256_maskload_ps(from, low), _mm256_maskload_ps(from + 8, high)};
    }
    REWARDPROP_INLINE Lanes load(const math::BFloat16* from) const {
        math::BFloat16 buffer[kLanes] = {};
        std::memcpy(buffer, from, static_cast<std::size_t>(count) * sizeof(*from));
        return Whole{}.load(buffer);
    }
    REWARDPROP_INLINE void store(Lanes value, float* to) const {
        _mm256_maskstore_ps(to, low, value.low);
        _mm256_maskstore_ps(to + 8, high, value.high);
    }
    REWARDPROP_INLINE void store(Lanes value, math::BFloat16* to) const {
        math::BFloat16 buffer[kLanes];
        Whole{}.store(value, buffer);
        std::memcpy(to, buffer, static_cast<std::size_t>(count) * sizeof(*to));
    }
    // All bits of the first `count` of 8 lanes.
    static REWARDPROP_INLINE __m256i first(std::int64_t count) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                                  _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    std::int64_t count;
    __m256i low, high;
};

#else

constexpr std::int64_t kLanes = 1;

using Lanes = float;

REWARDPROP_LANES float broadcast(float value) { return value; }
REWARDPROP_LANES float multiply_add(float a, float b, float c) {
    return math::multiply_add(a, b, c);
}

struct Whole {
    template <typename T>
    REWARDPROP_INLINE float load(const T* from) const {
        return math::to_float(*from);
    }
    template <typename T>
    REWARDPROP_INLINE void store(float value, T* to) const {
        math::store(value, to);
    }
};

#endif

// Calls body(column, lanes) for all columns. No two may write or read what another one writes.
template <typename Body>
REWARDPROP_LANES void for_columns(std::int64_t columns, const Body& body) {
    std::int64_t column = 0;
#pragma GCC ivdep
    for (; column + kLanes <= columns; column += kLanes) body(column, Whole{});
#if defined(__AVX2__)
    if (column < columns) body(column, Part(columns - column));
#endif
}

}  // namespace rewardprop::cpu::REWARDPROP_ISA
