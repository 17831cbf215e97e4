// Group normalisation where a block keeps a whole group in shared memory: everything is read once
// and written once. Legend: group_norm_silu.h.
#pragma once

#include "group_norm_parts.cuh"
#include "reduce.cuh"

namespace rewardprop::cuda {

constexpr int kWholeThreads = 512;  // at most

// The block's group, in packs of N elements that are neighbours in memory. It lies there in rows:
// channels last, of the group's D channels at one position; channels first, of one channel's P
// positions. N divides them.
template <int N>
struct Group {
    std::int64_t image;
    std::int64_t channel;  // the group's first
    std::int64_t base;     // where it begins
    std::int64_t stride;   // from row to row
    unsigned packs_in_row;
    unsigned packs;
    unsigned width;
    unsigned positions;
    bool channels_last;

    __device__ __forceinline__ explicit Group(const GroupNormShape& shape) {
        const unsigned groups = static_cast<unsigned>(shape.groups);
        width = static_cast<unsigned>(shape.channels) / groups;
        positions = static_cast<unsigned>(shape.positions);
        channels_last = shape.channels_last;
        image = blockIdx.x / groups;
        channel = static_cast<std::int64_t>(blockIdx.x % groups) * width;
        base = image * shape.channels * shape.positions +
               (channels_last ? channel : channel * shape.positions);
        stride = channels_last ? shape.channels : shape.positions;
        packs_in_row = (channels_last ? width : positions) / N;
        packs = width * positions / N;
    }

    // Where a pack lies in memory, and the channel of its first element. The others have the same
    // (channels first), or the following ones.
    struct Spot {
        std::int64_t at;
        std::int64_t channel;
    };
    __device__ __forceinline__ Spot spot(unsigned pack) const {
        const unsigned row = pack / packs_in_row;
        const unsigned first = (pack - row * packs_in_row) * N;
        return {base + row * stride + first, channel + (channels_last ? first : row)};
    }

    // The index of an element in shared memory, where packs lie one after another.
    __device__ __forceinline__ unsigned held(unsigned position, unsigned k) const {
        return channels_last ? position * width + k : k * positions + position;
    }

    __device__ __forceinline__ float size() const { return static_cast<float>(width * positions); }
};

template <typename T, int N>
__global__ void __launch_bounds__(kWholeThreads) group_norm_whole_kernel(const GroupNorm<T> op) {
    const Group<N> group(op.shape);
    T* const held = dynamic_shared_memory<T>();
    float sum = 0.0f;
    for (unsigned pack = threadIdx.x; pack < group.packs; pack += blockDim.x) {
        const Pack<T, N> x = load_pack<N>(op.x + group.spot(pack).at);
        store_pack(x, held + pack * N);
        for (int i = 0; i < N; ++i) sum += math::to_float(x.values[i]);
    }
    const float mean = block_sum({sum, 0.0f}).a / group.size();

    // Every thread finds in shared memory what it put there itself.
    float squares = 0.0f;
    for (unsigned pack = threadIdx.x; pack < group.packs; pack += blockDim.x) {
        const Pack<T, N> x = load_pack<N>(held + pack * N);
        for (int i = 0; i < N; ++i) {
            const float distance = math::to_float(x.values[i]) - mean;
            squares += distance * distance;
        }
    }
    squares = block_sum({squares, 0.0f}).a;
    const float rstd = reciprocal_deviation(squares, group.size(), op.eps);
    if (threadIdx.x == 0) {
        op.mean[blockIdx.x] = mean;
        op.rstd[blockIdx.x] = rstd;
    }

    for (unsigned pack = threadIdx.x; pack < group.packs; pack += blockDim.x) {
        const typename Group<N>::Spot spot = group.spot(pack);
        const Pack<T, N> x = load_pack<N>(held + pack * N);
        Pack<T, N> y;
        for (int i = 0; i < N; ++i) {
            const std::int64_t c = spot.channel + (group.channels_last ? i : 0);
            const Affine affine{mean, rstd, parameter<T>(op.weight, c, 1.0f),
                                parameter<T>(op.bias, c, 0.0f)};
            const float z = affine.z(affine.normalised(math::to_float(x.values[i])));
            math::store(op.silu ? math::silu(z) : z, &y.values[i]);
        }
        store_pack(y, op.y + spot.at);
    }
}

template <typename T>
struct ElementGradient {
    float xhat;
    float grad_z;

    __device__ __forceinline__ ElementGradient(T grad, T x, const Affine& affine, bool silu) {
        xhat = affine.normalised(math::to_float(x));
        grad_z = math::to_float(grad) * slope(affine.z(xhat), silu);
    }
};

// grad_x, and sums (2, B, C): of grad_z and of grad_z xhat; either may be null.
template <typename T, int N>
__global__ void __launch_bounds__(kWholeThreads)
    group_norm_whole_backward_kernel(const GroupNormBackward<T> op) {
    const Group<N> group(op.shape);
    T* const held_x = dynamic_shared_memory<T>();
    T* const held_grad = held_x + (group.packs * N * sizeof(T) + 15) / 16 * 16 / sizeof(T);
    const float mean = op.mean[blockIdx.x];
    const float rstd = op.rstd[blockIdx.x];
    const auto affine = [&](std::int64_t c) -> Affine {
        return {mean, rstd, parameter<T>(op.weight, c, 1.0f), parameter<T>(op.bias, c, 0.0f)};
    };

    Pair of_group{0.0f, 0.0f};
    for (unsigned pack = threadIdx.x; pack < group.packs; pack += blockDim.x) {
        const typename Group<N>::Spot spot = group.spot(pack);
        const Pack<T, N> x = load_pack<N>(op.x + spot.at);
        const Pack<T, N> grad = load_pack<N>(op.grad + spot.at);
        store_pack(x, held_x + pack * N);
        store_pack(grad, held_grad + pack * N);
        for (int i = 0; i < N; ++i) {
            const Affine own = affine(spot.channel + (group.channels_last ? i : 0));
            const ElementGradient<T> element(grad.values[i], x.values[i], own, op.silu);
            of_group.a += element.grad_z * own.weight;
            of_group.b += element.grad_z * own.weight * element.xhat;
        }
    }
    of_group = block_sum(of_group);

    if (op.grad_x != nullptr) {
        const float mean_grad = of_group.a / group.size();
        const float mean_product = of_group.b / group.size();
        for (unsigned pack = threadIdx.x; pack < group.packs; pack += blockDim.x) {
            const typename Group<N>::Spot spot = group.spot(pack);
            const Pack<T, N> x = load_pack<N>(held_x + pack * N);
            const Pack<T, N> grad = load_pack<N>(held_grad + pack * N);
            Pack<T, N> grad_x;
            for (int i = 0; i < N; ++i) {
                const Affine own = affine(spot.channel + (group.channels_last ? i : 0));
                const ElementGradient<T> element(grad.values[i], x.values[i], own, op.silu);
                const float centred = element.grad_z * own.weight - mean_grad;
                math::store(rstd * (centred - element.xhat * mean_product), &grad_x.values[i]);
            }
            store_pack(grad_x, op.grad_x + spot.at);
        }
    }
    if (op.sums == nullptr) return;

    // A channel for each warp. What other threads keep is there since the sum over the block.
    for (unsigned k = threadIdx.x / 32; k < group.width; k += blockDim.x / 32) {
        const Affine own = affine(group.channel + k);
        Pair of_channel{0.0f, 0.0f};
        for (unsigned p = threadIdx.x % 32; p < group.positions; p += 32) {
            const unsigned at = group.held(p, k);
            const ElementGradient<T> element(held_grad[at], held_x[at], own, op.silu);
            of_channel.a += element.grad_z;
            of_channel.b += element.grad_z * element.xhat;
        }
        of_channel = warp_sum(of_channel);
        if (threadIdx.x % 32 != 0) continue;
        const std::int64_t at = group.image * op.shape.channels + group.channel + k;
        op.sums[at] = of_channel.a;
        op.sums[op.shape.batch * op.shape.channels + at] = of_channel.b;
    }
}

}  // namespace rewardprop::cuda
