// Vectors and small matrix products for attention_loops.cpp, in the instruction set that file is
// compiled for. Everything is `static` for the reason given in math/portable.h.
//
// A product's operands are items of 32 bits: `Floats`, or `Pairs` of bfloat16, two neighbours along
// the dimension that is summed over, which one instruction of AVX512-BF16 multiplies and adds to a
// float32 sum.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace rewardprop::cpu::REWARDPROP_ISA {

// Vectors' results stay in registers: kHeight rows of up to kColumns vectors.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kHeight = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kHeight = 4;
#else
constexpr int kLanes = 4, kHeight = 4;
#endif
constexpr int kColumns = 3;
// So many items make one sum.
constexpr std::int64_t kDepth = 64;

// Whole vectors of the widest instruction set.
constexpr std::int64_t kBlock = 16;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::uint32_t Bits __attribute__((vector_size(kLanes * sizeof(std::uint32_t))));

template <typename V, typename Item>
static inline V load_as(const Item* from) {
    V value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

static inline Vector load(const float* from) { return load_as<Vector>(from); }

static inline void save(Vector value, float* to) { std::memcpy(to, &value, sizeof(value)); }

static inline Vector broadcast(float value) { return value - Vector{}; }

static inline std::int64_t round_up(std::int64_t value, std::int64_t step) {
    return (value + step - 1) / step * step;
}

struct Floats {
    using Item = float;
    static constexpr std::int64_t kEach = 1;        // numbers in an item
    static constexpr std::int64_t kRows = kHeight;  // a left operand has a multiple of these,
    static constexpr std::int64_t kPad = kBlock;    // rows lie a multiple of these apart,
    static constexpr std::int64_t kDeep = 1;        // and sums are a multiple of these long
    using Block = Vector;
    static Vector add_product(Vector sum, Item left, Block right) { return sum + left * right; }
};

// The first of a pair is in the low half.
struct Pairs {
    using Item = std::uint32_t;
    static constexpr std::int64_t kEach = 2;
    static constexpr std::int64_t kRows = kHeight;
    static constexpr std::int64_t kPad = kBlock;
    static constexpr std::int64_t kDeep = 2;
    using Block = Bits;
    static Vector add_product(Vector sum, Item left, Block right) {
#if defined(__AVX512BF16__)
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left),
                                        (__m512bh)right);
#else
        // What that instruction computes, for the tests: nothing runs here where it is missing.
        const std::uint32_t low = left << 16, high = left & 0xFFFF0000u;
        float first, second;
        std::memcpy(&first, &low, sizeof(first));
        std::memcpy(&second, &high, sizeof(second));
        const Bits lows = right << 16, highs = right & 0xFFFF0000u;
        sum += second * load_as<Vector>(&highs);
        return sum + first * load_as<Vector>(&lows);
#endif
    }
};

// c (kHeight, N vectors) = or += a b. a is (kHeight, depth), or (depth, kHeight) where kTurned;
// rows of a, b and c are a_step, b_step and c_step apart; depth counts items. The sum begins at
// zero and is added to c at the end: what is long is summed in pieces, which loses less than one
// chain of additions.
template <typename Kind, int N, bool kTurned, bool kAdd>
static inline void product_tile(const typename Kind::Item* __restrict a, std::int64_t a_step,
                                const typename Kind::Item* __restrict b, std::int64_t b_step,
                                float* __restrict c, std::int64_t c_step, std::int64_t depth) {
    Vector sum[kHeight][N];
#pragma GCC unroll 8
    for (int m = 0; m < kHeight; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = Vector{};
    }
    for (std::int64_t d = 0; d < depth; ++d) {
        typename Kind::Block right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            right[n] = load_as<typename Kind::Block>(b + d * b_step + n * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < kHeight; ++m) {
            const typename Kind::Item left = kTurned ? a[d * a_step + m] : a[m * a_step + d];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[m][n] = Kind::add_product(sum[m][n], left, right[n]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kHeight; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            float* to = c + m * c_step + n * kLanes;
            save(kAdd ? load(to) + sum[m][n] : sum[m][n], to);
        }
    }
}

template <typename Kind, int N, bool kTurned, bool kAdd>
static void product_panel(const typename Kind::Item* a, std::int64_t a_step,
                          const typename Kind::Item* b, std::int64_t b_step, float* c,
                          std::int64_t c_step, std::int64_t rows, std::int64_t depth) {
    for (std::int64_t m = 0; m < rows; m += kHeight) {
        product_tile<Kind, N, kTurned, kAdd>(a + (kTurned ? m : m * a_step), a_step, b, b_step,
                                             c + m * c_step, c_step, depth);
    }
}

template <typename Kind, bool kTurned, bool kAdd>
static void product_piece(const typename Kind::Item* a, std::int64_t a_step,
                          const typename Kind::Item* b, std::int64_t b_step, float* c,
                          std::int64_t c_step, std::int64_t rows, std::int64_t columns,
                          std::int64_t depth) {
    std::int64_t left = columns / kLanes;
    while (left > 0) {
        // Four vectors are two and two: one alone would wait for its own sums.
        const std::int64_t n = left == 4 || left == 2 ? 2 : (left < kColumns ? left : kColumns);
        const auto panel = n == 3   ? product_panel<Kind, 3, kTurned, kAdd>
                           : n == 2 ? product_panel<Kind, 2, kTurned, kAdd>
                                    : product_panel<Kind, 1, kTurned, kAdd>;
        panel(a, a_step, b, b_step, c, c_step, rows, depth);
        left -= n;
        b += n * kLanes;
        c += n * kLanes;
    }
}

// c (rows, columns) = or += a b, with rows a multiple of kHeight and columns one of kLanes. Panels
// of b stay in the first cache while a passes by.
template <typename Kind, bool kTurned>
static void product(const typename Kind::Item* a, std::int64_t a_step, const typename Kind::Item* b,
                    std::int64_t b_step, float* c, std::int64_t c_step, std::int64_t rows,
                    std::int64_t columns, std::int64_t depth, bool add) {
    for (std::int64_t d = 0; d < depth; d += kDepth) {
        const std::int64_t piece = depth - d < kDepth ? depth - d : kDepth;
        const auto run =
            add || d > 0 ? product_piece<Kind, kTurned, true> : product_piece<Kind, kTurned, false>;
        run(a + (kTurned ? d * a_step : d), a_step, b + d * b_step, b_step, c, c_step, rows,
            columns, piece);
    }
}

}  // namespace rewardprop::cpu::REWARDPROP_ISA
