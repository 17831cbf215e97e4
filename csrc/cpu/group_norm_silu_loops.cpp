// The loops of group normalisation, compiled once per instruction set with REWARDPROP_ISA naming it
// (isa.h). Loops over the columns, some rows at a time; nothing here may include a header with
// shared inline functions (see math/portable.h).
#include "group_norm_silu.h"
#include "lanes_silu.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

namespace {

// --- rows ---

template <int kCount>
struct Step {
    static constexpr int count = kCount;
};

// Calls body(step, offset) for some rows at a time, kStep of them and the last ones singly: what
// all rows share is then read, and what they are summed up in read and written, once for kStep
// rows.
template <int kStep, typename Body>
void in_steps(Rows rows, const Body& body) {
    std::int64_t row = 0;
    for (; row + kStep <= rows.count; row += kStep) body(Step<kStep>{}, row * rows.columns);
    for (; row < rows.count; ++row) body(Step<1>{}, row * rows.columns);
}

// --- coefficients ---

struct PerColumn {
    const float* __restrict values;
    template <typename Access>
    REWARDPROP_INLINE Lanes at(std::int64_t column, Access access) const {
        return access.load(values + column);
    }
};

struct Shared {
    Lanes value;
    template <typename Access>
    REWARDPROP_INLINE Lanes at(std::int64_t, Access) const {
        return value;
    }
};

// Calls body(coefficient...) with each as PerColumn or Shared; a call's are all of one kind.
template <typename Body, typename... Rest>
void with(const Body& body, Coefficients first, Rest... rest) {
    if (first.shared)
        return body(Shared{broadcast(*first.values)}, Shared{broadcast(*rest.values)}...);
    body(PerColumn{first.values}, PerColumn{rest.values}...);
}

// --- SiLU ---

// What rounds its result to T may compute it so.
template <typename T>
struct PrecisionOf {
    using Type = Short;
};
template <>
struct PrecisionOf<float> {
    using Type = Exact;
};

struct None {};  // no SiLU

REWARDPROP_LANES Lanes activated(Lanes z, None) { return z; }
template <typename Precision>
REWARDPROP_LANES Lanes activated(Lanes z, Precision precision) {
    return silu(z, precision);
}

REWARDPROP_LANES Lanes grad_of_z(Lanes grad, Lanes, None) { return grad; }
template <typename Precision>
REWARDPROP_LANES Lanes grad_of_z(Lanes grad, Lanes z, Precision precision) {
    return grad * silu_slope(z, precision);
}

// --- statistics ---

constexpr int kMomentRows = 8;

// The mean of some rows, evenly spread, of each column: what all are measured from.
template <typename T>
void pivots(Rows rows, const T* __restrict x, float* __restrict pivot) {
    const std::int64_t count = rows.count < kMomentRows ? rows.count : kMomentRows;
    const std::int64_t stride = rows.count / count * rows.columns;
    const Lanes share = broadcast(1.0f / static_cast<float>(count));
    for_columns(rows.columns, [&](std::int64_t c, auto access) __attribute__((always_inline)) {
        Lanes mean = broadcast(0.0f);
        for (std::int64_t k = 0; k < count; ++k)
            mean = multiply_add(access.load(x + k * stride + c), share, mean);
        access.store(mean, pivot + c);
    });
}

template <int kStep, typename T>
void moments_step(std::int64_t columns, const T* __restrict x, const float* __restrict pivot,
                  float* __restrict sums, float* __restrict squares) {
    for_columns(columns, [&](std::int64_t c, auto access) __attribute__((always_inline)) {
        const Lanes middle = access.load(pivot + c);
        // A step's own sums first: the error of long chains of additions grows with their length.
        Lanes sum = broadcast(0.0f), sum_squares = broadcast(0.0f);
#pragma GCC unroll 8
        for (int k = 0; k < kStep; ++k) {
            const Lanes distance = access.load(x + k * columns + c) - middle;
            sum = sum + distance;
            sum_squares = multiply_add(distance, distance, sum_squares);
        }
        access.store(access.load(sums + c) + sum, sums + c);
        access.store(access.load(squares + c) + sum_squares, squares + c);
    });
}

// Sums of distances from a pivot and of their squares. The pivot is the mean of kMomentRows of the
// rows, which therefore have a variance of at least (pivot - mean)^2 kMomentRows / count: what is
// subtracted at the end is at most 32 times what remains of 256 rows, whatever x is, and costs 5
// bits of it at most. E[x^2] - E[x]^2 has no such bound.
template <typename T>
void moments(Rows rows, const T* x, float* mean, float* squares, float* pivot) {
    pivots(rows, x, pivot);
    for (std::int64_t c = 0; c < rows.columns; ++c) mean[c] = squares[c] = 0.0f;
    in_steps<kMomentRows>(rows, [&](auto step, std::int64_t at) {
        moments_step<step.count>(rows.columns, x + at, pivot, mean, squares);
    });
    const Lanes share = broadcast(1.0f / static_cast<float>(rows.count));
    for_columns(rows.columns, [&](std::int64_t c, auto access) __attribute__((always_inline)) {
        const Lanes sum = access.load(mean + c), delta = sum * share;
        access.store(access.load(squares + c) - sum * delta, squares + c);
        access.store(access.load(pivot + c) + delta, mean + c);
    });
}

// So many sums at a time: one would wait for itself.
constexpr int kSums = 8;

template <typename Add>
REWARDPROP_INLINE void for_sums(std::int64_t columns, const Add& add) {
    std::int64_t c = 0;
    for (; c + kSums <= columns; c += kSums) {
#pragma GCC unroll 8
        for (int k = 0; k < kSums; ++k) add(k, c + k);
    }
    for (int k = 0; c < columns; ++c, ++k) add(k, c);
}

double total(const double* sums) {
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
           ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

Moments joined(Rows rows, const float* mean, const float* squares) {
    double means[kSums] = {}, inner[kSums] = {}, outer[kSums] = {};
    for_sums(rows.columns, [&](int k, std::int64_t c) {
        means[k] += mean[c];
        inner[k] += squares[c];
    });
    const double middle = total(means) / static_cast<double>(rows.columns);
    for_sums(rows.columns, [&](int k, std::int64_t c) {
        const double distance = mean[c] - middle;
        outer[k] += distance * distance;
    });
    const double count = static_cast<double>(rows.count);
    return {count * static_cast<double>(rows.columns), middle, total(inner) + count * total(outer)};
}

void affine(std::int64_t channels, const float* __restrict weight, const float* __restrict bias,
            double mean, float rstd, float* __restrict scale, float* __restrict shift) {
    for (std::int64_t c = 0; c < channels; ++c) {
        scale[c] = weight ? rstd * weight[c] : rstd;
        shift[c] = static_cast<float>((bias ? bias[c] : 0.0) - mean * scale[c]);
    }
}

// --- forward ---

template <int kStep, typename Silu, typename T, typename C>
void normalise_step(std::int64_t columns, const T* __restrict x, C scale, C shift, Silu silu,
                    T* __restrict y) {
    for_columns(columns, [&](std::int64_t c, auto access) __attribute__((always_inline)) {
        const Lanes own_scale = scale.at(c, access), own_shift = shift.at(c, access);
#pragma GCC unroll 1
        for (int k = 0; k < kStep; ++k) {
            const Lanes value = access.load(x + k * columns + c);
            const Lanes z = multiply_add(value, own_scale, own_shift);
            access.store(activated(z, silu), y + k * columns + c);
        }
    });
}

template <typename T>
void normalise(Rows rows, const T* x, Affine affine, bool silu, T* y) {
    with(
        [&](auto scale, auto shift) {
            const auto run = [&](auto silu) {
                in_steps<4>(rows, [&](auto step, std::int64_t at) {
                    normalise_step<step.count>(rows.columns, x + at, scale, shift, silu, y + at);
                });
            };
            if (silu) return run(typename PrecisionOf<T>::Type{});
            run(None{});
        },
        affine.scale, affine.shift);
}

// --- backward ---

template <int kStep, bool kWrite, typename Silu, typename T, typename C>
void sums_step(std::int64_t columns, const T* __restrict grad, const T* __restrict x, C scale,
               C shift, C centre, Silu silu, float* __restrict sums, float* __restrict products,
               float* __restrict grad_z) {
    for_columns(columns, [&](std::int64_t c, auto access) __attribute__((always_inline)) {
        const Lanes own_scale = scale.at(c, access), own_shift = shift.at(c, access);
        const Lanes middle = centre.at(c, access);
        Lanes sum = access.load(sums + c), product = access.load(products + c);
#pragma GCC unroll 1
        for (int k = 0; k < kStep; ++k) {
            const Lanes value = access.load(x + k * columns + c);
            const Lanes z = multiply_add(value, own_scale, own_shift);
            const Lanes own = grad_of_z(access.load(grad + k * columns + c), z, silu);
            if (kWrite) access.store(own, grad_z + k * columns + c);
            sum = sum + own;
            product = multiply_add(own, value - middle, product);
        }
        access.store(sum, sums + c);
        access.store(product, products + c);
    });
}

template <typename T>
void sums(Rows rows, const T* grad, const T* x, Affine affine, Coefficients centre, SumsOf what,
          float* sums, float* products, float* grad_z) {
    with(
        [&](auto scale, auto shift, auto middle) {
            const auto run = [&](auto silu, auto writes) {
                in_steps<4>(rows, [&](auto step, std::int64_t at) {
                    constexpr bool kWrite = decltype(writes)::count != 0;
                    sums_step<step.count, kWrite>(rows.columns, grad + at, x + at, scale, shift,
                                                  middle, silu, sums, products,
                                                  kWrite ? grad_z + at : nullptr);
                });
            };
            if (!what.silu) return run(None{}, Step<0>{});
            if (grad_z) return run(Exact{}, Step<1>{});
            if (what.exact) return run(Exact{}, Step<0>{});
            run(typename PrecisionOf<T>::Type{}, Step<0>{});
        },
        affine.scale, affine.shift, centre);
}

template <int kStep, typename Silu, typename T, typename C>
void input_gradient_step(std::int64_t columns, const T* grad, const T* x, C scale, C shift,
                         C x_factor, C constant, Silu silu, T* grad_x) {
    for_columns(columns, [&](std::int64_t c, auto access) __attribute__((always_inline)) {
        const Lanes own_scale = scale.at(c, access), own_shift = shift.at(c, access);
        const Lanes own_x_factor = x_factor.at(c, access), own_constant = constant.at(c, access);
#pragma GCC unroll 1
        for (int k = 0; k < kStep; ++k) {
            const Lanes value = access.load(x + k * columns + c);
            const Lanes z = multiply_add(value, own_scale, own_shift);
            const Lanes grad_z = grad_of_z(access.load(grad + k * columns + c), z, silu);
            const Lanes rest = multiply_add(value, own_x_factor, own_constant);
            access.store(multiply_add(grad_z, own_scale, rest), grad_x + k * columns + c);
        }
    });
}

template <typename T>
void input_gradient(Rows rows, const T* grad, const T* x, Affine affine, InputGradient gradient,
                    bool silu, T* grad_x) {
    with(
        [&](auto scale, auto shift, auto x_factor, auto constant) {
            const auto run = [&](auto silu) {
                in_steps<4>(rows, [&](auto step, std::int64_t at) {
                    input_gradient_step<step.count>(rows.columns, grad + at, x + at, scale, shift,
                                                    x_factor, constant, silu, grad_x + at);
                });
            };
            if (silu) return run(typename PrecisionOf<T>::Type{});
            run(None{});
        },
        affine.scale, affine.shift, gradient.x_factor, gradient.constant);
}

}  // namespace

const GroupNormLoops<float> group_norm_loops_f32 = {
    moments<float>, joined, affine, normalise<float>, sums<float>, input_gradient<float>,
};
const GroupNormLoops<math::BFloat16> group_norm_loops_bf16 = {
    moments<math::BFloat16>,        joined, affine, normalise<math::BFloat16>, sums<math::BFloat16>,
    input_gradient<math::BFloat16>,
};

}  // namespace rewardprop::cpu::REWARDPROP_ISA
