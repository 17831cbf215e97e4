// Products of bfloat16 in the tile registers of AMX, for attention_loops.cpp: a tile is 16 rows of
// 16 items, an item two numbers side by side (attention_products.h) or one float32 result.
//
// A right operand has its items along the dimension that is summed over, as pairs of AVX512-BF16
// have; a left one lies by rows. So a product that sums over the rows of its left operand is
// computed transposed, with the operands changing sides.
#pragma once

#include "../math/bf16.h"
#include "attention_products.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

constexpr std::int64_t kTile = 16;

struct Tiles : Pairs {
    static constexpr std::int64_t kRows = 2 * kTile;  // two tiles of left operands, two of right
    static constexpr std::int64_t kPad = 2 * kTile;
    static constexpr std::int64_t kDeep = 2 * kTile;
};

#if defined(__AMX_BF16__)

// Holds the tile registers for as long as it lives.
struct TileUse {
    TileUse() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shape;
        for (int tile = 0; tile < 8; ++tile) {
            shape.row_bytes[tile] = kTile * sizeof(Pairs::Item);
            shape.rows[tile] = kTile;
        }
        _tile_loadconfig(&shape);
    }
    ~TileUse() { _tile_release(); }
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;
};

// GCC's own do not say that they read memory.
#define REWARDPROP_TILE_LOAD(tile, from, step)                   \
    do {                                                         \
        __asm__ volatile("" ::: "memory");                       \
        _tile_loadd(tile, from, (step) * sizeof(std::uint32_t)); \
    } while (false)
#define REWARDPROP_TILE_SAVE(tile, to, step) _tile_stored(tile, to, (step) * sizeof(float))
#define REWARDPROP_TILE_ZERO(tile) _tile_zero(tile)
#define REWARDPROP_TILE_ADD(sum, left, right) _tile_dpbf16ps(sum, left, right)

#else

// What the instructions compute, for the tests: nothing runs here where they are missing.
struct TileUse {
    ~TileUse() {}
};

struct EmulatedTile {
    std::uint32_t at[kTile][kTile];
};
static thread_local EmulatedTile emulated_tiles[8];

static void emulated_move(void* to, std::int64_t to_step, const void* from,
                          std::int64_t from_step) {
    for (std::int64_t i = 0; i < kTile; ++i)
        std::memcpy(static_cast<std::uint32_t*>(to) + i * to_step,
                    static_cast<const std::uint32_t*>(from) + i * from_step,
                    kTile * sizeof(std::uint32_t));
}

static void emulated_add(int sum, int left, int right) {
    const auto widened = [](std::uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    };
    for (std::int64_t i = 0; i < kTile; ++i) {
        for (std::int64_t j = 0; j < kTile; ++j) {
            float total = widened(emulated_tiles[sum].at[i][j]);
            for (std::int64_t d = 0; d < kTile; ++d) {
                const std::uint32_t a = emulated_tiles[left].at[i][d];
                const std::uint32_t b = emulated_tiles[right].at[d][j];
                total += widened(a << 16) * widened(b << 16);
                total += widened(a & 0xFFFF0000u) * widened(b & 0xFFFF0000u);
            }
            std::memcpy(&emulated_tiles[sum].at[i][j], &total, sizeof(total));
        }
    }
}

#define REWARDPROP_TILE_LOAD(tile, from, step) \
    emulated_move(emulated_tiles[tile].at, kTile, from, step)
#define REWARDPROP_TILE_SAVE(tile, to, step) emulated_move(to, step, emulated_tiles[tile].at, kTile)
#define REWARDPROP_TILE_ZERO(tile) (emulated_tiles[tile] = {})
#define REWARDPROP_TILE_ADD(sum, left, right) emulated_add(sum, left, right)

#endif

// kM by kN tiles of c = or += a b: tiles 0 to 3 hold sums, 4 and 5 of a, 6 and 7 of b.
template <int kM, int kN>
static inline void tile_block(const Pairs::Item* a, std::int64_t a_step, const Pairs::Item* b,
                              std::int64_t b_step, float* c, std::int64_t c_step,
                              std::int64_t depth, bool add) {
    const std::int64_t down = kTile * c_step;
    if (add) {
        REWARDPROP_TILE_LOAD(0, c, c_step);
        if constexpr (kN > 1) REWARDPROP_TILE_LOAD(1, c + kTile, c_step);
        if constexpr (kM > 1) REWARDPROP_TILE_LOAD(2, c + down, c_step);
        if constexpr (kM > 1 && kN > 1) REWARDPROP_TILE_LOAD(3, c + down + kTile, c_step);
    } else {
        REWARDPROP_TILE_ZERO(0);
        if constexpr (kN > 1) REWARDPROP_TILE_ZERO(1);
        if constexpr (kM > 1) REWARDPROP_TILE_ZERO(2);
        if constexpr (kM > 1 && kN > 1) REWARDPROP_TILE_ZERO(3);
    }
    for (std::int64_t d = 0; d < depth; d += kTile) {
        REWARDPROP_TILE_LOAD(4, a + d, a_step);
        REWARDPROP_TILE_LOAD(6, b + d * b_step, b_step);
        REWARDPROP_TILE_ADD(0, 4, 6);
        if constexpr (kN > 1) {
            REWARDPROP_TILE_LOAD(7, b + d * b_step + kTile, b_step);
            REWARDPROP_TILE_ADD(1, 4, 7);
        }
        if constexpr (kM > 1) {
            REWARDPROP_TILE_LOAD(5, a + kTile * a_step + d, a_step);
            REWARDPROP_TILE_ADD(2, 5, 6);
        }
        if constexpr (kM > 1 && kN > 1) REWARDPROP_TILE_ADD(3, 5, 7);
    }
    REWARDPROP_TILE_SAVE(0, c, c_step);
    if constexpr (kN > 1) REWARDPROP_TILE_SAVE(1, c + kTile, c_step);
    if constexpr (kM > 1) REWARDPROP_TILE_SAVE(2, c + down, c_step);
    if constexpr (kM > 1 && kN > 1) REWARDPROP_TILE_SAVE(3, c + down + kTile, c_step);
}

// c (rows, columns) = or += a b, all three multiples of kTile.
static void tile_product(const Pairs::Item* a, std::int64_t a_step, const Pairs::Item* b,
                         std::int64_t b_step, float* c, std::int64_t c_step, std::int64_t rows,
                         std::int64_t columns, std::int64_t depth, bool add) {
    for (std::int64_t n = 0; n < columns; n += 2 * kTile) {
        const bool wide = n + kTile < columns;
        for (std::int64_t m = 0; m < rows; m += 2 * kTile) {
            const bool tall = m + kTile < rows;
            const auto block = tall ? (wide ? tile_block<2, 2> : tile_block<2, 1>)
                                    : (wide ? tile_block<1, 2> : tile_block<1, 1>);
            block(a + m * a_step, a_step, b + n, b_step, c + m * c_step + n, c_step, depth, add);
        }
    }
}

// --- Transposition, 16 by 16 items of 32 bits ---

#if defined(__AVX512BF16__)

static inline void transpose(__m512i (&row)[kTile]) {
    __m512i half[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; i += 2) {
        half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    // Now each quarter of row[4 i + j] holds what its column 4 q + j has of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int i = 0; i < kTile; i += 4) {
        row[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xEE);
        const __m512i next_low = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x44);
        const __m512i next_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xEE);
        half[j] = _mm512_shuffle_i32x4(low, next_low, 0x88);
        half[4 + j] = _mm512_shuffle_i32x4(low, next_low, 0xDD);
        half[8 + j] = _mm512_shuffle_i32x4(high, next_high, 0x88);
        half[12 + j] = _mm512_shuffle_i32x4(high, next_high, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) row[i] = half[i];
}

static inline void save_rows(const __m512i (&row)[kTile], void* to, std::int64_t step) {
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < kTile; ++i)
        _mm512_storeu_si512(static_cast<std::uint32_t*>(to) + i * step, row[i]);
}

// A mask of the first `count` of up to 32.
static inline std::uint32_t first_of_32(std::int64_t count) {
    return count >= 32 ? 0xFFFFFFFFu : count <= 0 ? 0u : (1u << count) - 1u;
}

#endif

// A tile of float32 results, transposed.
static inline void transpose_tile(const float* from, std::int64_t from_step, float* to,
                                  std::int64_t to_step) {
#if defined(__AVX512BF16__)
    __m512i row[kTile];
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < kTile; ++i) row[i] = _mm512_loadu_si512(from + i * from_step);
    transpose(row);
    save_rows(row, to, to_step);
#else
    for (std::int64_t i = 0; i < kTile; ++i)
        for (std::int64_t j = 0; j < kTile; ++j) to[j * to_step + i] = from[i * from_step + j];
#endif
}

// Rows of bfloat16, read as pairs and transposed; zeros after so many rows and numbers of a row.
static inline void turn_tile(const math::BFloat16* from, std::int64_t row_stride, std::int64_t rows,
                             std::int64_t numbers, Pairs::Item* to, std::int64_t step) {
#if defined(__AVX512BF16__)
    const __mmask32 mask = first_of_32(numbers);
    __m512i row[kTile];
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < kTile; ++i)
        row[i] = _mm512_maskz_loadu_epi16(i < rows ? mask : 0, from + i * row_stride);
    transpose(row);
    save_rows(row, to, step);
#else
    for (std::int64_t i = 0; i < kTile; ++i) {
        for (std::int64_t d = 0; d < kTile; ++d) {
            const math::BFloat16* at = from + i * row_stride + 2 * d;
            const std::uint32_t low = i < rows && 2 * d < numbers ? at[0].bits : 0;
            const std::uint32_t high = i < rows && 2 * d + 1 < numbers ? at[1].bits : 0;
            to[d * step + i] = low | high << 16;
        }
    }
#endif
}

// Pairs of rows of bfloat16 as items, transposed; zeros after so many rows and numbers of a row.
static inline void stand_tile(const math::BFloat16* from, std::int64_t row_stride,
                              std::int64_t rows, std::int64_t numbers, Pairs::Item* to,
                              std::int64_t step) {
#if defined(__AVX512BF16__)
    const __mmask16 mask = static_cast<__mmask16>(first_of_32(numbers));
    const auto widened = [&](std::int64_t i) {
        return _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(i < rows ? mask : 0, from + i * row_stride));
    };
    __m512i row[kTile];
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < kTile; ++i)
        row[i] = _mm512_or_si512(widened(2 * i), _mm512_slli_epi32(widened(2 * i + 1), 16));
    transpose(row);
    save_rows(row, to, step);
#else
    const auto at = [&](std::int64_t i, std::int64_t d) {
        return i < rows && d < numbers ? std::uint32_t{from[i * row_stride + d].bits} : 0u;
    };
    for (std::int64_t i = 0; i < kTile; ++i)
        for (std::int64_t d = 0; d < kTile; ++d)
            to[d * step + i] = at(2 * i, d) | at(2 * i + 1, d) << 16;
#endif
}

// The products that attention_packing.h describes.
struct TileProducts : Tiles {
    using Use = TileUse;

    static void multiply(const Item* a, std::int64_t a_step, const Item* b, std::int64_t b_step,
                         float* c, std::int64_t c_step, std::int64_t rows, std::int64_t columns,
                         std::int64_t depth, bool add) {
        tile_product(a, a_step, b, b_step, c, c_step, rows, columns, depth, add);
    }

    // The sums are (columns, keys), `padded` apart.
    static void add_over_queries(const Item* a, std::int64_t padded, const Item* b, std::int64_t,
                                 std::int64_t queries, std::int64_t first, float* sums,
                                 std::int64_t, std::int64_t columns, std::int64_t rows, bool add) {
        tile_product(b + first / 2, queries / 2, a, padded, sums, padded, columns, padded,
                     round_up(rows, kDeep) / 2, add);
    }

    static const float* of_keys(const float* sums, std::int64_t key, std::int64_t padded,
                                std::int64_t step, std::int64_t columns, float* spare) {
        for (std::int64_t d = 0; d < columns; d += kTile)
            transpose_tile(sums + d * padded + key, padded, spare + d, step);
        return spare;
    }
};

}  // namespace rewardprop::cpu::REWARDPROP_ISA
