#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "elementwise.h"
#include "group_norm_sliced.cuh"
#include "group_norm_whole.cuh"
#include "launch.cuh"

namespace rewardprop::cuda {

namespace {

// The least power of two that is not below the size.
std::int64_t least_power(std::int64_t size) {
    std::int64_t power = 1;
    while (power < size) power *= 2;
    return power;
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

dim3 blocks(std::int64_t count) { return dim3(static_cast<unsigned>(count)); }

template <typename T>
bool packs_fit(int pack, std::initializer_list<const T*> arrays) {
    for (const T* array : arrays) {
        if (!aligned(array, static_cast<std::int64_t>(pack * sizeof(T)))) return false;
    }
    return true;
}

template <int N>
using Width = std::integral_constant<int, N>;

// Calls body(Width<N>) for the widest of 8, 4, 2 and 1 elements, of at most 16 bytes, that divides
// a row and fits the arrays' addresses.
template <typename T, typename Body>
void with_pack(std::int64_t row, std::initializer_list<const T*> arrays, const Body& body) {
    const auto fits = [&](int pack) { return row % pack == 0 && packs_fit(pack, arrays); };
    if constexpr (kPack<T> == 8) {
        if (fits(8)) return body(Width<8>{});
    }
    if (fits(4)) return body(Width<4>{});
    if (fits(2)) return body(Width<2>{});
    body(Width<1>{});
}

// The sliced form's rows are long: packs of 16 bytes, or else single elements.
template <typename T, typename Body>
void with_wide_pack(const GroupNormShape& shape, std::initializer_list<const T*> arrays,
                    const Body& body) {
    constexpr int kWide = kPack<T>;
    const std::int64_t row = shape.channels_last ? shape.channels : shape.positions;
    const bool slices_fit = shape.channels_last || shape.slice % kWide == 0;
    if (row % kWide == 0 && slices_fit && packs_fit(kWide, arrays)) return body(Width<kWide>{});
    body(Width<1>{});
}

// --- whole ---

template <int N>
dim3 whole_block(const GroupNormShape& shape) {
    // Four packs for each thread, where there are that many.
    const std::int64_t packs = shape.width() * shape.positions / N;
    const std::int64_t threads = least_power(divide_up(packs, 4));
    return dim3(
        static_cast<unsigned>(std::clamp(threads, std::int64_t{32}, std::int64_t{kWholeThreads})));
}

// Bytes of a group, filled up so that a second one behind it is aligned.
template <typename T>
std::size_t held_bytes(const GroupNormShape& shape) {
    return (static_cast<std::size_t>(shape.width() * shape.positions) * sizeof(T) + 15) / 16 * 16;
}

std::int64_t row_of(const GroupNormShape& shape) {
    return shape.channels_last ? shape.width() : shape.positions;
}

// --- sliced ---

template <int N>
Tile tile_of(const GroupNormShape& shape) {
    const std::int64_t packs = (shape.channels_last ? shape.channels : shape.positions) / N;
    if (!shape.channels_last) {
        const std::int64_t lanes = std::min<std::int64_t>(least_power(packs), kSlicedThreads);
        return {static_cast<int>(lanes), divide_up(shape.channels, kSlicedThreads / lanes)};
    }
    // The widest of those that leave fewest channels idle; not less than a line of the cache.
    std::int64_t lanes = std::min<std::int64_t>(least_power(packs), 32);
    const auto filled = [&](std::int64_t n) { return divide_up(packs, n) * n; };
    for (std::int64_t n = lanes / 2; n >= 8; n /= 2) {
        if (filled(n) < filled(lanes)) lanes = n;
    }
    return {static_cast<int>(lanes), divide_up(packs, lanes)};
}

dim3 sliced_grid(const GroupNormShape& shape, const Tile& tile) {
    return blocks(shape.batch * shape.slices * tile.channel_blocks);
}

// Blocks that fill a GPU of about 128 multiprocessors, four on each.
constexpr std::int64_t kBlocks = 512;

template <int N>
std::int64_t length_of_slice(const GroupNormShape& shape) {
    const Tile tile = tile_of<N>(shape);
    const std::int64_t step = shape.channels_last ? kSlicedThreads / tile.lanes : tile.lanes * N;
    const std::int64_t wanted = divide_up(kBlocks, shape.batch * tile.channel_blocks);
    const std::int64_t length = divide_up(divide_up(shape.positions, wanted), step) * step;
    return std::min(length, std::int64_t{1} << 30);
}

}  // namespace

template <typename T>
std::int64_t slice_of(const GroupNormShape& shape, int arrays) {
    if (shape.count() == 0 || shape.can_be_kept(arrays, sizeof(T))) return 0;
    std::int64_t slice = 0;
    GroupNormShape any = shape;
    any.slice = 0;  // a multiple of every pack
    with_wide_pack<T>(any, {},
                      [&](auto width) { slice = length_of_slice<decltype(width)::value>(shape); });
    return slice;
}

template <typename T>
void run(const GroupNorm<T>& op, Stream stream) {
    const GroupNormShape& shape = op.shape;
    if (shape.count() == 0) return;
    const dim3 groups = blocks(shape.batch * shape.groups);
    if (shape.slice == 0) {
        return with_pack<T>(row_of(shape), {op.x, op.y}, [&](auto width) {
            constexpr int N = decltype(width)::value;
            launch("group_norm_silu", group_norm_whole_kernel<T, N>, groups, whole_block<N>(shape),
                   held_bytes<T>(shape), stream, op);
        });
    }
    with_wide_pack<T>(shape, {op.x, op.y}, [&](auto width) {
        constexpr int N = decltype(width)::value;
        const Tile tile = tile_of<N>(shape);
        const dim3 grid = sliced_grid(shape, tile);
        launch("group_norm_silu, moments", group_norm_moments_kernel<T, N>, grid,
               dim3(kSlicedThreads), 0, stream, op, tile);
        launch("group_norm_silu, join", group_norm_join_moments_kernel, groups, dim3(kJoinThreads),
               0, stream, shape, op.partial, op.mean, op.rstd, op.eps);
        launch("group_norm_silu, normalise", group_norm_normalise_kernel<T, N>, grid,
               dim3(kSlicedThreads), 0, stream, op, tile);
    });
}

template <typename T>
void run(const GroupNormBackward<T>& op, Stream stream) {
    const GroupNormShape& shape = op.shape;
    if (shape.count() == 0) return;
    const dim3 groups = blocks(shape.batch * shape.groups);
    const std::initializer_list<const T*> arrays = {op.grad, op.x, op.grad_x};  // null fits
    if (shape.slice == 0) {
        with_pack<T>(row_of(shape), arrays, [&](auto width) {
            constexpr int N = decltype(width)::value;
            launch("group_norm_silu_backward", group_norm_whole_backward_kernel<T, N>, groups,
                   whole_block<N>(shape), 2 * held_bytes<T>(shape), stream, op);
        });
    } else {
        with_wide_pack<T>(shape, arrays, [&](auto width) {
            constexpr int N = decltype(width)::value;
            const Tile tile = tile_of<N>(shape);
            const dim3 grid = sliced_grid(shape, tile);
            launch("group_norm_silu_backward, sums", group_norm_sums_kernel<T, N>, grid,
                   dim3(kSlicedThreads), 0, stream, op, tile);
            launch("group_norm_silu_backward, join", group_norm_join_sums_kernel<T>, groups,
                   dim3(kJoinThreads), 0, stream, op);
            if (op.grad_x == nullptr) return;
            launch("group_norm_silu_backward, grad_x", group_norm_input_gradient_kernel<T, N>, grid,
                   dim3(kSlicedThreads), 0, stream, op, tile);
        });
    }
    if (op.sums == nullptr) return;
    launch("group_norm_silu_backward, parameters", group_norm_parameter_gradients_kernel<T>,
           blocks(divide_up(shape.channels, kSlicedThreads)), dim3(kSlicedThreads), 0, stream, op);
}

template std::int64_t slice_of<float>(const GroupNormShape&, int);
template void run(const GroupNorm<float>&, Stream);
template std::int64_t slice_of<math::BFloat16>(const GroupNormShape&, int);
template void run(const GroupNorm<math::BFloat16>&, Stream);
template std::int64_t slice_of<math::Half>(const GroupNormShape&, int);
template void run(const GroupNorm<math::Half>&, Stream);
template void run(const GroupNormBackward<float>&, Stream);
template void run(const GroupNormBackward<math::BFloat16>&, Stream);
template void run(const GroupNormBackward<math::Half>&, Stream);

}  // namespace rewardprop::cuda
