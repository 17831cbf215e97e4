// How attention_loops.cpp brings rows of a head into the items that its products read
// (attention_products.h), in four layouts:
//
//     rows     (count, width)   a left operand; neighbours along the width make an item
//     turned   (width, count)   K or V of Q K^T and dO V^T; the same items, transposed
//     stacked  (count, width)   a right operand; neighbours along the count make an item
//     queries  Q or dO of the sums over queries, as `add_over_queries` wants them
//
// Everything is `static` for the reason given in math/portable.h.
#pragma once

#include "../math/bf16.h"
#include "attention_products.h"
#include "attention_tiles.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

// How many items hold so many numbers, with what sums are filled up with.
template <typename Kind>
constexpr std::int64_t items(std::int64_t count) {
    return (count + Kind::kDeep - 1) / Kind::kDeep * Kind::kDeep / Kind::kEach;
}

// Products in registers of vectors.
template <typename Kind>
struct VectorProducts : Kind {
    using Item = typename Kind::Item;

    // What holds registers that a thread must ask for.
    struct Use {
        ~Use() {}
    };

    // c (rows, columns) = or += a b
    static void multiply(const Item* a, std::int64_t a_step, const Item* b, std::int64_t b_step,
                         float* c, std::int64_t c_step, std::int64_t rows, std::int64_t columns,
                         std::int64_t depth, bool add) {
        product<Kind, false>(a, a_step, b, b_step, c, c_step, rows, columns, depth, add);
    }

    // sums (keys, columns) = or += a^T b, where a is (rows, keys), the queries from `first` on, and
    // b `stacked`, all `queries` of them. Rows of a are `padded` apart, those of sums `step`.
    static void add_over_queries(const Item* a, std::int64_t padded, const Item* b,
                                 std::int64_t step, std::int64_t queries, std::int64_t first,
                                 float* sums, std::int64_t keys, std::int64_t columns,
                                 std::int64_t rows, bool add) {
        static_cast<void>(queries);
        product<Kind, true>(a, padded, b + items<Kind>(first) * step, step, sums, step,
                            round_up(keys, Kind::kRows), columns, items<Kind>(rows), add);
    }

    // Those sums, kBlock keys from `key` on; `spare` has room for them.
    static const float* of_keys(const float* sums, std::int64_t key, std::int64_t padded,
                                std::int64_t step, std::int64_t columns, float* spare) {
        static_cast<void>(padded), static_cast<void>(columns), static_cast<void>(spare);
        return sums + key * step;
    }
};

// float32 items from either dtype.
struct FloatPacking : VectorProducts<Floats> {
    // A left and a right operand are the same, so that one copy does for both.
    static constexpr bool kStackedAreRows = true;

    // To rows that are `step` apart, zeros after the width and in rows up to `padded`.
    template <typename T>
    static void rows(const T* __restrict from, std::int64_t row_stride, std::int64_t count,
                     std::int64_t padded, std::int64_t width, float* __restrict to,
                     std::int64_t step) {
        for (std::int64_t i = 0; i < count; ++i) {
            for (std::int64_t d = 0; d < width; ++d)
                to[i * step + d] = math::to_float(from[i * row_stride + d]);
            for (std::int64_t d = width; d < step; ++d) to[i * step + d] = 0.0f;
        }
        for (std::int64_t i = count * step; i < padded * step; ++i) to[i] = 0.0f;
    }

    template <typename T>
    static void stacked(const T* from, std::int64_t row_stride, std::int64_t count,
                        std::int64_t padded, std::int64_t width, float* to, std::int64_t step) {
        rows(from, row_stride, count, padded, width, to, step);
    }

    template <typename T>
    static void queries(const T* from, std::int64_t row_stride, std::int64_t count,
                        std::int64_t padded, std::int64_t width, float* to, std::int64_t step) {
        rows(from, row_stride, count, padded, width, to, step);
    }

    // To rows that are `step` apart, zeros after the count.
    template <typename T>
    static void turned(const T* __restrict from, std::int64_t row_stride, std::int64_t count,
                       std::int64_t width, float* __restrict to, std::int64_t step) {
        std::int64_t first = 0;
        for (; first + kBlock <= count; first += kBlock) {
            for (std::int64_t d = 0; d < width; ++d) {
                for (std::int64_t i = 0; i < kBlock; ++i)
                    to[d * step + first + i] = math::to_float(from[(first + i) * row_stride + d]);
            }
        }
        for (std::int64_t d = 0; d < width && first < step; ++d) {
            for (std::int64_t i = first; i < step; ++i)
                to[d * step + i] = i < count ? math::to_float(from[i * row_stride + d]) : 0.0f;
        }
    }

    // Results of products are operands as they are.
    static constexpr bool kInPlace = true;
};

// bfloat16 as it is, two numbers to an item. Products are those of vectors or of tiles.
template <typename Products>
struct BFloat16Packing : Products {
    using Item = typename Products::Item;
    static constexpr bool kStackedAreRows = false;
    static constexpr bool kInPlace = false;

    static Item pair(math::BFloat16 first, math::BFloat16 second) {
        return first.bits | static_cast<Item>(second.bits) << 16;
    }

    static void rows(const math::BFloat16* __restrict from, std::int64_t row_stride,
                     std::int64_t count, std::int64_t padded, std::int64_t width,
                     Item* __restrict to, std::int64_t step) {
        for (std::int64_t i = 0; i < count; ++i) {
            const math::BFloat16* row = from + i * row_stride;
            std::memcpy(to + i * step, row, width / 2 * sizeof(Item));
            if (width % 2 != 0) to[i * step + width / 2] = pair(row[width - 1], {0});
            for (std::int64_t d = (width + 1) / 2; d < step; ++d) to[i * step + d] = 0;
        }
        for (std::int64_t i = count * step; i < padded * step; ++i) to[i] = 0;
    }

    static void stacked(const math::BFloat16* __restrict from, std::int64_t row_stride,
                        std::int64_t count, std::int64_t padded, std::int64_t width,
                        Item* __restrict to, std::int64_t step) {
        for (std::int64_t i = 0; i < padded; i += 2, to += step) {
            const math::BFloat16* first = from + i * row_stride;
            const std::int64_t filled = i < count ? width : 0;
            if (i + 1 < count) {
                for (std::int64_t d = 0; d < width; ++d)
                    to[d] = pair(first[d], first[row_stride + d]);
            } else {
                for (std::int64_t d = 0; d < filled; ++d) to[d] = pair(first[d], {0});
            }
            for (std::int64_t d = filled; d < step; ++d) to[d] = 0;
        }
    }

    static void turned(const math::BFloat16* __restrict from, std::int64_t row_stride,
                       std::int64_t count, std::int64_t width, Item* __restrict to,
                       std::int64_t step) {
        const std::int64_t items = width / 2;
        std::int64_t first = 0;
        for (; first + kBlock <= count; first += kBlock) {
            for (std::int64_t d = 0; d < items; ++d) {
                for (std::int64_t i = 0; i < kBlock; ++i) {
                    const math::BFloat16* at = from + (first + i) * row_stride + 2 * d;
                    std::memcpy(to + d * step + first + i, at, sizeof(Item));
                }
            }
        }
        for (std::int64_t d = 0; d < items && first < step; ++d) {
            for (std::int64_t i = first; i < step; ++i) {
                const math::BFloat16* at = from + i * row_stride + 2 * d;
                to[d * step + i] = i < count ? pair(at[0], at[1]) : 0;
            }
        }
        for (std::int64_t i = 0; i < step && width % 2 != 0; ++i)
            to[items * step + i] = i < count ? pair(from[i * row_stride + width - 1], {0}) : 0;
    }

    // A row of results as a row of a left operand, which is `padded` numbers long.
    static void round(const float* __restrict from, std::int64_t padded, Item* __restrict to) {
        for (std::int64_t i = 0; i < padded; i += kBlock) {
#if defined(__AVX512BF16__)
            const __m256bh halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), (__m256i)halves);
#else
            for (std::int64_t j = 0; j < kBlock; j += 2)
                to[(i + j) / 2] = pair(rounded(from[i + j]), rounded(from[i + j + 1]));
#endif
        }
    }

    // Two rows of results as a row of a turned left operand.
    static void round(const float* __restrict first, const float* __restrict second,
                      std::int64_t padded, Item* __restrict to) {
        for (std::int64_t i = 0; i < padded; i += kBlock) {
#if defined(__AVX512BF16__)
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(second + i),
                                                              _mm512_loadu_ps(first + i));
            const __m512i crossed =
                _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(crossed, both));
#else
            for (std::int64_t j = i; j < i + kBlock; ++j)
                to[j] = pair(rounded(first[j]), rounded(second[j]));
#endif
        }
    }

    static math::BFloat16 rounded(float value) {
        math::BFloat16 result;
        math::store(value, &result);
        return result;
    }
};

struct PairPacking : BFloat16Packing<VectorProducts<Pairs>> {
    static void queries(const math::BFloat16* from, std::int64_t row_stride, std::int64_t count,
                        std::int64_t padded, std::int64_t width, Item* to, std::int64_t step) {
        stacked(from, row_stride, count, padded, width, to, step);
    }
};

struct TilePacking : BFloat16Packing<TileProducts> {
    static void turned(const math::BFloat16* from, std::int64_t row_stride, std::int64_t count,
                       std::int64_t width, Item* to, std::int64_t step) {
        for (std::int64_t first = 0; first < step; first += kTile) {
            for (std::int64_t d = 0; d < items<Tiles>(width); d += kTile)
                turn_tile(from + first * row_stride + 2 * d, row_stride, count - first,
                          width - 2 * d, to + d * step + first, step);
        }
    }

    // Transposed: (width, pairs of queries).
    static void queries(const math::BFloat16* from, std::int64_t row_stride, std::int64_t count,
                        std::int64_t padded, std::int64_t width, Item* to, std::int64_t step) {
        for (std::int64_t first = 0; first < padded; first += 2 * kTile) {
            for (std::int64_t d = 0; d < step; d += kTile)
                stand_tile(from + first * row_stride + d, row_stride, count - first, width - d,
                           to + d * items<Tiles>(padded) + first / 2, items<Tiles>(padded));
        }
    }
};

// What products of tensors of T run on.
template <typename T>
struct PackingOf {
    using Type = FloatPacking;
};
// The macros are for tests of these forms on processors that cannot run them.
#if defined(__AMX_BF16__) || defined(REWARDPROP_TILES)
template <>
struct PackingOf<math::BFloat16> {
    using Type = TilePacking;
};
#elif defined(__AVX512BF16__) || defined(REWARDPROP_PAIRS)
template <>
struct PackingOf<math::BFloat16> {
    using Type = PairPacking;
};
#endif

}  // namespace rewardprop::cpu::REWARDPROP_ISA
