// Group normalisation with an optional SiLU on a GPU; T is float, math::BFloat16 or math::Half.
//
// Shape legend: B images, P positions, C channels, G groups of D = C / G channels, S slices of the
// positions.
#pragma once

#include <cstdint>

#include "stream.h"

namespace rewardprop::cuda {

// Bytes of a group (in the backward pass, of its x and its gradient together) that a block may keep
// in shared memory: what remains of the 48 KB that every device gives without being asked.
constexpr std::int64_t kHeldBytes = 40 * 1024;

// All sizes but positions and count are below 2^31, and slices times channels: a GPU takes several
// times as long to divide 64 bits as 32.

struct GroupNormShape {
    std::int64_t batch;
    std::int64_t channels;
    std::int64_t positions;
    std::int64_t groups;
    bool channels_last;
    std::int64_t slice;   // positions of a slice; 0 where a block keeps a whole group
    std::int64_t slices;  // and how many there are

    std::int64_t width() const { return channels / groups; }
    std::int64_t count() const { return batch * channels * positions; }

    bool can_be_kept(std::int64_t arrays, std::int64_t item_size) const {
        return positions <= kHeldBytes / (arrays * item_size) / width();
    }
};

// Weight or bias, one number for each channel, in T or in float; or none.
struct Parameter {
    const void* data;
    bool single;  // float
};

// mean and rstd (B, G), and y laid out as x, of x.
template <typename T>
struct GroupNorm {
    GroupNormShape shape;
    const T* x;
    Parameter weight;
    Parameter bias;
    float* mean;
    float* rstd;
    T* y;
    float* partial;  // (B, S, 2, C), room that only the sliced form needs
    float eps;
    bool silu;
};

// Those gradients that are not null.
template <typename T>
struct GroupNormBackward {
    GroupNormShape shape;
    const T* grad;
    const T* x;
    const float* mean;
    const float* rstd;
    Parameter weight;
    Parameter bias;
    T* grad_x;
    void* grad_weight;   // of the dtype of weight
    void* grad_bias;     // of the dtype of bias
    float* sums;         // (2, B, C), room for grad_bias and grad_weight of each image
    float* partial;      // (B, S, 2, C), and
    float* group_means;  // (B, G, 2), room that only the sliced form needs
    bool silu;
};

// The positions of a slice: enough blocks for a GPU, whole steps for each. 0 where a block can keep
// `arrays` groups. A fixed function of the sizes; `shape.slice` is not looked at.
template <typename T>
std::int64_t slice_of(const GroupNormShape& shape, int arrays);

template <typename T>
void run(const GroupNorm<T>& op, Stream stream);
template <typename T>
void run(const GroupNormBackward<T>& op, Stream stream);

}  // namespace rewardprop::cuda
