// Group normalisation where no block can keep a group: blocks share out positions and channels, so
// that one image fills a GPU. Statistics by slice and channel, joined by a second kernel in a fixed
// order; a third reads x again, beginning with what was read last. Legend: group_norm_silu.h.
#pragma once

#include "group_norm_parts.cuh"
#include "reduce.cuh"

namespace rewardprop::cuda {

constexpr int kSlicedThreads = 256;
constexpr int kSlicedBlocks = 2;  // at least, on a multiprocessor: unasked, ptxas spills for more
constexpr int kJoinThreads = 128;

// How the threads of a block are shared out. Neighbouring threads take neighbouring packs: of one
// position's channels (channels last), or of one channel's positions.
struct Tile {
    int lanes;  // threads side by side, a power of two
    std::int64_t channel_blocks;
};

// What a thread walks: packs of N elements, the same channels all the way.
template <int N>
struct Walk {
    std::int64_t image;
    std::int64_t slice;          // its number
    std::int64_t channel;        // of the first element of each pack
    std::int64_t block_channel;  // of the first thread
    std::int64_t at;             // where the first pack lies,
    std::int64_t stride;         // from there to the next,
    std::int64_t packs;          // and how many there are
    std::int64_t origin;         // the slice's first position in this thread's first channel
    std::int64_t next_origin;    // from channel to channel
    bool real;                   // the channel exists; a pack's channels exist together

    __device__ __forceinline__ Walk(const GroupNormShape& shape, const Tile& tile) {
        const bool last = shape.channels_last;
        const unsigned rest = blockIdx.x / static_cast<unsigned>(tile.channel_blocks);
        const unsigned slices = static_cast<unsigned>(shape.slices);
        const std::int64_t block = blockIdx.x % static_cast<unsigned>(tile.channel_blocks);
        image = rest / slices;
        slice = rest % slices;

        const int thread = static_cast<int>(threadIdx.x);
        const int beside = thread % tile.lanes, across = thread / tile.lanes;
        const int others = kSlicedThreads / tile.lanes;
        block_channel = block * (last ? tile.lanes * N : others);
        channel = block_channel + (last ? beside * N : across);
        real = channel < shape.channels;

        const std::int64_t begin = slice * shape.slice;
        const std::int64_t end =
            begin + shape.slice < shape.positions ? begin + shape.slice : shape.positions;
        const std::int64_t p = begin + (last ? across : beside * N);
        const std::int64_t step = last ? others : tile.lanes * N;
        const std::int64_t base = image * shape.channels * shape.positions;
        const std::int64_t position_stride = last ? shape.channels : 1;
        next_origin = last ? 1 : 0;
        origin = base + (last ? channel : channel * shape.positions) + begin * position_stride;
        at = origin + (p - begin) * position_stride;
        stride = step * position_stride;
        packs = real && p < end
                    ? (static_cast<unsigned>(end - p) + static_cast<unsigned>(step) - 1) /
                          static_cast<unsigned>(step)
                    : 0;
    }

    __device__ __forceinline__ std::int64_t channel_of(int i) const {
        return channel + next_origin * i;
    }
};

// A block's results, N of each thread: those of one channel are a column of its table.
template <int N>
struct Columns {
    int count;
    int first;  // where the thread's own begin in the table,
    int next;   // and from one to the next

    __device__ __forceinline__ Columns(const GroupNormShape& shape, const Tile& tile) {
        const int thread = static_cast<int>(threadIdx.x);
        count = shape.channels_last ? tile.lanes * N : kSlicedThreads / tile.lanes;
        first = shape.channels_last ? thread * N
                                    : thread % tile.lanes * N * count + thread / tile.lanes;
        next = shape.channels_last ? 1 : count;
    }

    // join(a, b) puts row b into row a until one row is left, halving: both are powers of two.
    template <typename Join>
    __device__ __forceinline__ void reduce(const Join& join) const {
        __syncthreads();
        for (int half = kSlicedThreads * N / 2; half >= count; half /= 2) {
            for (int i = static_cast<int>(threadIdx.x); i < half; i += kSlicedThreads) {
                join(i, i + half);
            }
            __syncthreads();
        }
    }
};

template <int N>
struct MomentsTable {
    float count[kSlicedThreads * N];
    float mean[kSlicedThreads * N];
    float squares[kSlicedThreads * N];
};

template <int N>
struct SumsTable {
    float a[kSlicedThreads * N];
    float b[kSlicedThreads * N];
};

// Where a block puts what its columns came to.
__device__ __forceinline__ float* partial_of(float* partial, const GroupNormShape& shape,
                                             std::int64_t image, std::int64_t slice) {
    return partial + (image * shape.slices + slice) * 2 * shape.channels;
}

// partial: each channel's mean over the slice, and its sum of squared distances from there.
//
// By Welford's rule in each thread, and Chan's among them, of the distances from the slice's first
// value, so that a large mean does not blur them.
template <typename T, int N>
__global__ void __launch_bounds__(kSlicedThreads, kSlicedBlocks)
    group_norm_moments_kernel(const GroupNorm<T> op, const Tile tile) {
    const Walk<N> walk(op.shape, tile);
    float first[N], mean[N], squares[N];
    for (int i = 0; i < N; ++i) {
        first[i] = walk.real ? math::to_float(op.x[walk.origin + walk.next_origin * i]) : 0.0f;
        mean[i] = 0.0f;
        squares[i] = 0.0f;
    }
    float count = 0.0f;
    for (std::int64_t pack = 0; pack < walk.packs; ++pack) {
        const Pack<T, N> x = load_pack<N>(op.x + walk.at + pack * walk.stride);
        count += 1.0f;
        const float share = 1.0f / count;
        for (int i = 0; i < N; ++i) {
            const float value = math::to_float(x.values[i]) - first[i];
            const float distance = value - mean[i];
            mean[i] += distance * share;
            squares[i] += distance * (value - mean[i]);
        }
    }

    MomentsTable<N>& table = shared_memory<MomentsTable<N>>();
    const Columns<N> columns(op.shape, tile);
    for (int i = 0; i < N; ++i) {
        const int own = columns.first + i * columns.next;
        table.count[own] = count;
        table.mean[own] = mean[i];
        table.squares[own] = squares[i];
    }
    columns.reduce([&](int a, int b) {
        const float more = table.count[b];
        if (more == 0.0f) return;  // also where both are 0
        const float together = table.count[a] + more;
        const float distance = table.mean[b] - table.mean[a];
        const float share = more / together;
        table.squares[a] += table.squares[b] + distance * distance * (table.count[a] * share);
        table.mean[a] += distance * share;
        table.count[a] = together;
    });

    float* const partial = partial_of(op.partial, op.shape, walk.image, walk.slice);
    const std::int64_t begin = walk.slice * op.shape.slice;
    const std::int64_t image = walk.image * op.shape.channels * op.shape.positions;
    for (int i = static_cast<int>(threadIdx.x); i < columns.count; i += kSlicedThreads) {
        const std::int64_t c = walk.block_channel + i;
        if (c >= op.shape.channels) continue;
        const std::int64_t origin =
            op.shape.channels_last ? begin * op.shape.channels + c : c * op.shape.positions + begin;
        partial[c] = math::to_float(op.x[image + origin]) + table.mean[i];
        partial[op.shape.channels + c] = table.squares[i];
    }
}

// Positions of a slice, as a float.
__device__ __forceinline__ float length_of(const GroupNormShape& shape, std::int64_t slice) {
    const std::int64_t left = shape.positions - slice * shape.slice;
    return static_cast<float>(left < shape.slice ? left : shape.slice);
}

// The group of a joining block.
struct GroupOfBlock {
    std::int64_t image;
    std::int64_t channel;  // the group's first
    unsigned width;

    __device__ __forceinline__ explicit GroupOfBlock(const GroupNormShape& shape) {
        const unsigned groups = static_cast<unsigned>(shape.groups);
        width = static_cast<unsigned>(shape.channels) / groups;
        image = blockIdx.x / groups;
        channel = static_cast<std::int64_t>(blockIdx.x % groups) * width;
    }
};

// mean and rstd of a block's group, of what the moments kernel left: the mean first, then the
// distances from it.
static __global__ void __launch_bounds__(kJoinThreads)
    group_norm_join_moments_kernel(const GroupNormShape shape, float* partial, float* mean,
                                   float* rstd, float eps) {
    const GroupOfBlock group(shape);
    const unsigned width = group.width;
    const unsigned count = static_cast<unsigned>(shape.slices) * width;
    const float size = static_cast<float>(width * shape.positions);
    const float* const own = partial_of(partial, shape, group.image, 0) + group.channel;

    // Means are summed as distances from the first, which a large mean does not blur.
    const float first = own[0];
    float shift = 0.0f;
    for (unsigned i = threadIdx.x; i < count; i += kJoinThreads) {
        const std::int64_t s = i / width, k = i % width;
        shift += length_of(shape, s) * (own[s * 2 * shape.channels + k] - first);
    }
    const float of_group = first + block_sum({shift, 0.0f}).a / size;

    float squares = 0.0f;
    for (unsigned i = threadIdx.x; i < count; i += kJoinThreads) {
        const std::int64_t s = i / width, k = i % width;
        const float distance = own[s * 2 * shape.channels + k] - of_group;
        squares +=
            own[(s * 2 + 1) * shape.channels + k] + length_of(shape, s) * (distance * distance);
    }
    squares = block_sum({squares, 0.0f}).a;
    if (threadIdx.x != 0) return;
    mean[blockIdx.x] = of_group;
    rstd[blockIdx.x] = reciprocal_deviation(squares, size, eps);
}

// What a thread's N channels and their groups say.
template <int N>
struct Affines {
    Affine of[N];
    std::int64_t group[N];  // of all the batch's

    template <typename Op>
    __device__ __forceinline__ Affines(const Op& op, const Walk<N>& walk) {
        read(op, op.x, walk);
    }

  private:
    template <typename Op, typename T>
    __device__ __forceinline__ void read(const Op& op, const T*, const Walk<N>& walk) {
        const unsigned width =
            static_cast<unsigned>(op.shape.channels) / static_cast<unsigned>(op.shape.groups);
        for (int i = 0; i < N; ++i) {
            group[i] = 0;
            of[i] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (!walk.real) continue;
            const std::int64_t c = walk.channel_of(i);
            group[i] = walk.image * op.shape.groups + static_cast<unsigned>(c) / width;
            of[i] = {op.mean[group[i]], op.rstd[group[i]], parameter<T>(op.weight, c, 1.0f),
                     parameter<T>(op.bias, c, 0.0f)};
        }
    }
};

template <typename T, int N>
__global__ void __launch_bounds__(kSlicedThreads, kSlicedBlocks)
    group_norm_normalise_kernel(const GroupNorm<T> op, const Tile tile) {
    const Walk<N> walk(op.shape, tile);
    const Affines<N> affines(op, walk);
    // Backwards: the cache holds what was read last.
    for (std::int64_t pack = walk.packs - 1; pack >= 0; --pack) {
        const std::int64_t at = walk.at + pack * walk.stride;
        const Pack<T, N> x = load_pack<N>(op.x + at);
        Pack<T, N> y;
        for (int i = 0; i < N; ++i) {
            const Affine& own = affines.of[i];
            const float z = own.z(own.normalised(math::to_float(x.values[i])));
            math::store(op.silu ? math::silu(z) : z, &y.values[i]);
        }
        store_pack(y, op.y + at);
    }
}

// partial: each channel's sums of grad_z and of grad_z xhat over the slice.
template <typename T, int N>
__global__ void __launch_bounds__(kSlicedThreads, kSlicedBlocks)
    group_norm_sums_kernel(const GroupNormBackward<T> op, const Tile tile) {
    const Walk<N> walk(op.shape, tile);
    Pair sums[N];
    for (int i = 0; i < N; ++i) sums[i] = {0.0f, 0.0f};
    const Affines<N> affines(op, walk);
    for (std::int64_t pack = 0; pack < walk.packs; ++pack) {
        const std::int64_t at = walk.at + pack * walk.stride;
        const Pack<T, N> x = load_pack<N>(op.x + at);
        const Pack<T, N> grad = load_pack<N>(op.grad + at);
        for (int i = 0; i < N; ++i) {
            const Affine& own = affines.of[i];
            const float xhat = own.normalised(math::to_float(x.values[i]));
            const float grad_z = math::to_float(grad.values[i]) * slope(own.z(xhat), op.silu);
            sums[i].a += grad_z;
            sums[i].b += grad_z * xhat;
        }
    }

    SumsTable<N>& table = shared_memory<SumsTable<N>>();
    const Columns<N> columns(op.shape, tile);
    for (int i = 0; i < N; ++i) {
        table.a[columns.first + i * columns.next] = sums[i].a;
        table.b[columns.first + i * columns.next] = sums[i].b;
    }
    columns.reduce([&](int a, int b) {
        table.a[a] += table.a[b];
        table.b[a] += table.b[b];
    });

    float* const partial = partial_of(op.partial, op.shape, walk.image, walk.slice);
    for (int i = static_cast<int>(threadIdx.x); i < columns.count; i += kSlicedThreads) {
        const std::int64_t c = walk.block_channel + i;
        if (c >= op.shape.channels) continue;
        partial[c] = table.a[i];
        partial[op.shape.channels + c] = table.b[i];
    }
}

// Of what the sums kernel left: group_means (B, G, 2), of weight grad_z and weight grad_z xhat,
// and, where it is not null, sums (2, B, C) over all slices. A channel for each warp.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads)
    group_norm_join_sums_kernel(const GroupNormBackward<T> op) {
    const GroupNormShape& shape = op.shape;
    const GroupOfBlock group(shape);
    const std::int64_t image = group.image;
    const int lane = static_cast<int>(threadIdx.x % 32);
    Pair of_group{0.0f, 0.0f};
    for (unsigned k = threadIdx.x / 32; k < group.width; k += kJoinThreads / 32) {
        const std::int64_t c = group.channel + k;
        Pair of_channel{0.0f, 0.0f};
        for (std::int64_t s = lane; s < shape.slices; s += 32) {
            const float* const partial = partial_of(op.partial, shape, image, s);
            of_channel.a += partial[c];
            of_channel.b += partial[shape.channels + c];
        }
        of_channel = warp_sum(of_channel);
        if (lane != 0) continue;
        const float weight = parameter<T>(op.weight, c, 1.0f);
        of_group.a += of_channel.a * weight;
        of_group.b += of_channel.b * weight;
        if (op.sums == nullptr) continue;
        op.sums[image * shape.channels + c] = of_channel.a;
        op.sums[(shape.batch + image) * shape.channels + c] = of_channel.b;
    }
    of_group = block_sum(of_group);
    if (threadIdx.x != 0) return;
    const float size = static_cast<float>(group.width * shape.positions);
    op.group_means[2 * static_cast<std::int64_t>(blockIdx.x)] = of_group.a / size;
    op.group_means[2 * static_cast<std::int64_t>(blockIdx.x) + 1] = of_group.b / size;
}

template <typename T, int N>
__global__ void __launch_bounds__(kSlicedThreads, kSlicedBlocks)
    group_norm_input_gradient_kernel(const GroupNormBackward<T> op, const Tile tile) {
    const Walk<N> walk(op.shape, tile);
    const Affines<N> affines(op, walk);
    Pair means[N];
    for (int i = 0; i < N; ++i) {
        means[i] = {op.group_means[2 * affines.group[i]], op.group_means[2 * affines.group[i] + 1]};
    }
    for (std::int64_t pack = walk.packs - 1; pack >= 0; --pack) {
        const std::int64_t at = walk.at + pack * walk.stride;
        const Pack<T, N> x = load_pack<N>(op.x + at);
        const Pack<T, N> grad = load_pack<N>(op.grad + at);
        Pack<T, N> grad_x;
        for (int i = 0; i < N; ++i) {
            const Affine& own = affines.of[i];
            const float xhat = own.normalised(math::to_float(x.values[i]));
            const float grad_z = math::to_float(grad.values[i]) * slope(own.z(xhat), op.silu);
            const float centred = grad_z * own.weight - means[i].a;
            math::store(own.rstd * (centred - xhat * means[i].b), &grad_x.values[i]);
        }
        store_pack(grad_x, op.grad_x + at);
    }
}

// Both forms: the sums of all images, a channel for each thread.
template <typename T>
__global__ void __launch_bounds__(kSlicedThreads, kSlicedBlocks)
    group_norm_parameter_gradients_kernel(const GroupNormBackward<T> op) {
    const std::int64_t channels = op.shape.channels;
    const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kSlicedThreads + threadIdx.x;
    if (c >= channels) return;
    Pair total{0.0f, 0.0f};
    for (std::int64_t image = 0; image < op.shape.batch; ++image) {
        total.a += op.sums[image * channels + c];
        total.b += op.sums[(op.shape.batch + image) * channels + c];
    }
    const auto write = [c](void* gradient, bool single, float value) {
        if (gradient == nullptr) return;
        if (single) {
            static_cast<float*>(gradient)[c] = value;
        } else {
            math::store(value, static_cast<T*>(gradient) + c);
        }
    };
    write(op.grad_bias, op.bias.single, total.a);
    write(op.grad_weight, op.weight.single, total.b);
}

}  // namespace rewardprop::cuda
