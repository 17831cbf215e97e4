// The loops of group normalisation, compiled once per instruction set with REWARDPROP_ISA naming it
// (scalar, avx2, avx512). Plain loops that the compiler vectorises along the columns; nothing here
// may include a header with shared inline functions (see math/portable.h).
#include "../math/silu.h"
#include "group_norm_silu.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

namespace {

// --- coefficients ---

struct PerColumn {
    const float* __restrict values;
    float operator[](std::int64_t column) const { return values[column]; }
};

struct Shared {
    float value;
    float operator[](std::int64_t) const { return value; }
};

// Calls body(coefficient...) with each as PerColumn or Shared; a call's are all of one kind.
template <typename Body, typename... Rest>
void with(const Body& body, Coefficients first, Rest... rest) {
    if (first.shared) return body(Shared{*first.values}, Shared{*rest.values}...);
    body(PerColumn{first.values}, PerColumn{rest.values}...);
}

// --- statistics ---

// Eight rows are read at once: their own mean, the squared distances from it, and both joined with
// what came before (Chan, Golub & LeVeque 1979). Nothing is read twice, and unlike E[x^2] - E[x]^2
// nothing cancels.
constexpr std::int64_t kRows = 8;

template <typename T>
void moments(Rows rows, const T* __restrict x, float* __restrict mean, float* __restrict squares) {
    for (std::int64_t c = 0; c < rows.columns; ++c) mean[c] = squares[c] = 0.0f;
    std::int64_t row = 0;
    for (; row + kRows <= rows.count; row += kRows) {
        const T* __restrict block = x + row * rows.columns;
        const float share = static_cast<float>(kRows) / static_cast<float>(row + kRows);
        const float cross = share * static_cast<float>(row);
        for (std::int64_t c = 0; c < rows.columns; ++c) {
            // Distances from the mean so far: a large mean then costs no digits of the deviation.
            const float pivot = mean[c];
            float v[kRows];
#pragma GCC unroll 8
            for (int k = 0; k < kRows; ++k)
                v[k] = math::to_float(block[k * rows.columns + c]) - pivot;
            const float sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
            const float delta = sum * (1.0f / kRows);
            float block_squares = 0.0f;
#pragma GCC unroll 8
            for (int k = 0; k < kRows; ++k) {
                const float distance = v[k] - delta;
                block_squares = math::multiply_add(distance, distance, block_squares);
            }
            mean[c] = math::multiply_add(delta, share, pivot);
            // The product with `cross` first: delta^2 alone could overflow where cross is zero.
            squares[c] += math::multiply_add(delta, delta * cross, block_squares);
        }
    }
    for (; row < rows.count; ++row) {
        const T* __restrict block = x + row * rows.columns;
        const float share = 1.0f / static_cast<float>(row + 1);
        for (std::int64_t c = 0; c < rows.columns; ++c) {
            const float value = math::to_float(block[c]);
            const float delta = value - mean[c];
            mean[c] = math::multiply_add(delta, share, mean[c]);
            squares[c] = math::multiply_add(delta, value - mean[c], squares[c]);
        }
    }
}

// --- forward ---

template <bool kSilu, typename T, typename C>
void normalise_rows(Rows rows, const T* __restrict x, C scale, C shift, T* __restrict y) {
    for (std::int64_t row = 0; row < rows.count; ++row) {
        for (std::int64_t c = 0; c < rows.columns; ++c) {
            const float z = math::multiply_add(math::to_float(x[c]), scale[c], shift[c]);
            math::store(kSilu ? math::silu(z) : z, y + c);
        }
        x += rows.columns;
        y += rows.columns;
    }
}

template <typename T>
void normalise(Rows rows, const T* x, Affine affine, bool silu, T* y) {
    with(
        [&](auto scale, auto shift) {
            if (silu) return normalise_rows<true>(rows, x, scale, shift, y);
            normalise_rows<false>(rows, x, scale, shift, y);
        },
        affine.scale, affine.shift);
}

// --- backward ---

template <bool kSilu>
float grad_of_z(float grad, float x, float scale, float shift) {
    return kSilu ? grad * math::silu_slope(math::multiply_add(x, scale, shift)) : grad;
}

template <bool kSilu, int kStep, typename T, typename C>
void sums_block(std::int64_t columns, const T* __restrict grad, const T* __restrict x, C scale,
                C shift, C centre, float* __restrict grad_z, float* __restrict product) {
    for (std::int64_t c = 0; c < columns; ++c) {
        float sum = 0.0f, sum_product = 0.0f;
#pragma GCC unroll 4
        for (int k = 0; k < kStep; ++k) {
            const float value = math::to_float(x[k * columns + c]);
            const float own =
                grad_of_z<kSilu>(math::to_float(grad[k * columns + c]), value, scale[c], shift[c]);
            sum += own;
            sum_product = math::multiply_add(own, value - centre[c], sum_product);
        }
        grad_z[c] += sum;
        product[c] += sum_product;
    }
}

template <bool kSilu, typename T, typename C>
void sums_rows(Rows rows, const T* grad, const T* x, C scale, C shift, C centre, float* grad_z,
               float* product) {
    constexpr int kStep = 4;  // rows for each time that the sums are read and written
    std::int64_t row = 0;
    for (; row + kStep <= rows.count; row += kStep) {
        sums_block<kSilu, kStep>(rows.columns, grad, x, scale, shift, centre, grad_z, product);
        grad += kStep * rows.columns;
        x += kStep * rows.columns;
    }
    for (; row < rows.count; ++row) {
        sums_block<kSilu, 1>(rows.columns, grad, x, scale, shift, centre, grad_z, product);
        grad += rows.columns;
        x += rows.columns;
    }
}

template <typename T>
void sums(Rows rows, const T* grad, const T* x, Affine affine, Coefficients centre, bool silu,
          float* grad_z, float* product) {
    with(
        [&](auto scale, auto shift, auto middle) {
            if (silu) return sums_rows<true>(rows, grad, x, scale, shift, middle, grad_z, product);
            sums_rows<false>(rows, grad, x, scale, shift, middle, grad_z, product);
        },
        affine.scale, affine.shift, centre);
}

template <bool kSilu, typename T, typename C>
void input_gradient_rows(Rows rows, const T* __restrict grad, const T* __restrict x, C scale,
                         C shift, C x_factor, C constant, T* __restrict grad_x) {
    for (std::int64_t row = 0; row < rows.count; ++row) {
        for (std::int64_t c = 0; c < rows.columns; ++c) {
            const float value = math::to_float(x[c]);
            const float grad_z =
                grad_of_z<kSilu>(math::to_float(grad[c]), value, scale[c], shift[c]);
            const float rest = math::multiply_add(value, x_factor[c], constant[c]);
            math::store(math::multiply_add(grad_z, scale[c], rest), grad_x + c);
        }
        grad += rows.columns;
        x += rows.columns;
        grad_x += rows.columns;
    }
}

template <typename T>
void input_gradient(Rows rows, const T* grad, const T* x, Affine affine, InputGradient gradient,
                    bool silu, T* grad_x) {
    with(
        [&](auto scale, auto shift, auto x_factor, auto constant) {
            if (silu)
                return input_gradient_rows<true>(rows, grad, x, scale, shift, x_factor, constant,
                                                 grad_x);
            input_gradient_rows<false>(rows, grad, x, scale, shift, x_factor, constant, grad_x);
        },
        affine.scale, affine.shift, gradient.x_factor, gradient.constant);
}

}  // namespace

const GroupNormLoops<float> group_norm_loops_f32 = {
    moments<float>,
    normalise<float>,
    sums<float>,
    input_gradient<float>,
};
const GroupNormLoops<math::BFloat16> group_norm_loops_bf16 = {
    moments<math::BFloat16>,
    normalise<math::BFloat16>,
    sums<math::BFloat16>,
    input_gradient<math::BFloat16>,
};

}  // namespace rewardprop::cpu::REWARDPROP_ISA
