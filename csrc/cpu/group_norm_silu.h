// Group normalisation with an optional SiLU, for channels first (NCHW) and channels last (NHWC).
//
// B images, C channels, G groups of D = C / G channels, P positions (the spatial sizes' product).
// Both layouts are walked as rows of columns: channels last has P rows of C columns; a channel of
// channels first is one row of P columns that share their coefficients.
#pragma once

#include <cstdint>

#include "../math/bf16.h"

namespace rewardprop::cpu {

struct GroupNormShape {
    std::int64_t batch;      // B
    std::int64_t channels;   // C
    std::int64_t positions;  // P
    std::int64_t groups;     // G
    bool channels_last;

    std::int64_t group_width() const { return channels / groups; }         // D
    std::int64_t group_size() const { return group_width() * positions; }  // elements of a group
    std::int64_t image_size() const { return channels * positions; }       // elements of an image
};

template <typename T>
struct GroupNorm {
    GroupNormShape shape;
    const T* x;
    const float* weight;  // (C,), null for ones
    const float* bias;    // (C,), null for zeros
    float* mean;          // (B, G), written
    float* rstd;          // (B, G), written
    T* y;
    double eps;
    bool silu;
};

template <typename T>
struct GroupNormBackward {
    GroupNormShape shape;
    const T* grad;
    const T* x;
    const float* mean;    // (B, G)
    const float* rstd;    // (B, G)
    const float* weight;  // (C,), null for ones
    const float* bias;    // (C,), null for zeros
    T* grad_x;            // null where it is not needed
    float* grad_weight;   // (C,), likewise
    float* grad_bias;     // (C,), likewise
    bool silu;
};

// A block of rows, one after another in memory.
struct Rows {
    std::int64_t count;
    std::int64_t columns;
};

struct Moments {
    double count = 0.0;
    double mean = 0.0;
    double squares = 0.0;  // the sum of squared distances from the mean
};

// Per-column coefficients, or one that all columns share.
struct Coefficients {
    const float* values;
    bool shared;
};

// z = scale x + shift.
struct Affine {
    Coefficients scale;
    Coefficients shift;
};

// grad_x = scale grad_z + x_factor x + constant.
struct InputGradient {
    Coefficients x_factor;
    Coefficients constant;
};

struct SumsOf {
    bool silu;
    bool exact;  // they are results in single precision, not only a part of what is rounded to T
};

// One instruction set's loops over a block of rows.
template <typename T>
struct GroupNormLoops {
    // Per column: the mean, and the sum of squared distances from it. `pivot` is room for as many.
    void (*moments)(Rows rows, const T* x, float* mean, float* squares, float* pivot);
    // Of all columns together.
    Moments (*joined)(Rows rows, const float* mean, const float* squares);
    // Of some channels of one group: scale = rstd weight, shift = bias - mean scale. The shift is
    // taken in double, and from the scale as rounded, so that a large mean costs one rounding.
    void (*affine)(std::int64_t channels, const float* weight, const float* bias, double mean,
                   float rstd, float* scale, float* shift);
    void (*normalise)(Rows rows, const T* x, Affine affine, bool silu, T* y);
    // Per column, added to what is there: the sums of grad_z and of grad_z (x - centre). With a
    // SiLU grad_z itself is written too, unless that is null.
    void (*sums)(Rows rows, const T* grad, const T* x, Affine affine, Coefficients centre,
                 SumsOf what, float* sums, float* products, float* grad_z);
    // Without a SiLU `grad` is the gradient of z, and may be where grad_x is written.
    void (*input_gradient)(Rows rows, const T* grad, const T* x, Affine affine,
                           InputGradient gradient, bool silu, T* grad_x);
};

// group_norm_silu_loops.cpp is compiled once per instruction set and defines these each time.
namespace scalar {
extern const GroupNormLoops<float> group_norm_loops_f32;
extern const GroupNormLoops<math::BFloat16> group_norm_loops_bf16;
}  // namespace scalar
namespace avx2 {
extern const GroupNormLoops<float> group_norm_loops_f32;
extern const GroupNormLoops<math::BFloat16> group_norm_loops_bf16;
}  // namespace avx2
namespace avx512 {
extern const GroupNormLoops<float> group_norm_loops_f32;
extern const GroupNormLoops<math::BFloat16> group_norm_loops_bf16;
}  // namespace avx512
namespace avx512_bf16 {
extern const GroupNormLoops<float> group_norm_loops_f32;
extern const GroupNormLoops<math::BFloat16> group_norm_loops_bf16;
}  // namespace avx512_bf16
namespace amx {
extern const GroupNormLoops<float> group_norm_loops_f32;
extern const GroupNormLoops<math::BFloat16> group_norm_loops_bf16;
}  // namespace amx

// On the selected instruction set and the OpenMP pool. The result does not depend on the number of
// threads: what a thread sums up is cut by the shape alone, and added in one order.
void run(const GroupNorm<float>& op);
void run(const GroupNorm<math::BFloat16>& op);
void run(const GroupNormBackward<float>& op);
void run(const GroupNormBackward<math::BFloat16>& op);

}  // namespace rewardprop::cpu
