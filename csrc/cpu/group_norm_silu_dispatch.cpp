// Cuts group normalisation into blocks of rows, shares them out over the threads, and joins what
// the instruction set's loops found in each. Sums over blocks are taken in double.
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "group_norm_silu.h"
#include "two_pass.h"

namespace rewardprop::cpu {

namespace {

const GroupNormLoops<float>& loops(float) { return REWARDPROP_SELECT(group_norm_loops_f32); }
const GroupNormLoops<math::BFloat16>& loops(math::BFloat16) {
    return REWARDPROP_SELECT(group_norm_loops_bf16);
}

// --- blocks ---

constexpr std::int64_t kLanes = 64;      // columns that a run of memory is folded into
constexpr std::int64_t kChunk = 65536;   // elements of a chunk, about
constexpr std::int64_t kMostRows = 256;  // single-precision sums stay short

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Channels last. A unit is an image, a chunk some of its positions; all channels are in both.
struct ChannelsLast {
    explicit ChannelsLast(const GroupNormShape& shape) : shape(shape) {
        const std::int64_t fitting = kChunk / std::max<std::int64_t>(shape.channels, 1) / 8 * 8;
        rows = std::min(std::max<std::int64_t>(fitting, 8), kMostRows);
        chunks = ceil_div(shape.positions, rows);
    }
    std::int64_t units() const { return shape.batch; }
    std::int64_t unit_size() const { return shape.image_size(); }

    Rows block(std::int64_t chunk) const {
        return {std::min(rows, shape.positions - chunk * rows), shape.channels};
    }
    std::int64_t offset(std::int64_t unit, std::int64_t chunk) const {
        return unit * unit_size() + chunk * rows * shape.channels;
    }

    GroupNormShape shape;
    std::int64_t rows;  // of a chunk, the last may have fewer
    std::int64_t chunks;
};

// Channels first. A unit is a group of an image, a chunk some of its channels, or a piece of one.
struct ChannelsFirst {
    explicit ChannelsFirst(const GroupNormShape& shape) : shape(shape) {
        const std::int64_t positions = std::max<std::int64_t>(shape.positions, 1);
        channels = std::min(std::max<std::int64_t>(kChunk / positions, 1), shape.group_width());
        pieces = channels > 1 ? 1 : ceil_div(positions, kChunk);
        chunks = ceil_div(shape.group_width(), channels) * pieces;
    }
    std::int64_t units() const { return shape.batch * shape.groups; }
    std::int64_t unit_size() const { return shape.group_size(); }

    // A run of memory within one channel.
    struct Run {
        std::int64_t channel;  // of the image
        std::int64_t piece;    // of the channel
        std::int64_t offset;   // in the tensor
        std::int64_t size;
    };

    template <typename Body>
    void for_each_run(std::int64_t unit, std::int64_t chunk, const Body& body) const {
        const std::int64_t width = shape.group_width(), piece = chunk % pieces;
        const std::int64_t first = chunk / pieces * channels;
        const std::int64_t begin = piece * kChunk;
        const std::int64_t size =
            pieces == 1 ? shape.positions : std::min(kChunk, shape.positions - begin);
        for (std::int64_t k = first; k < std::min(first + channels, width); ++k) {
            const std::int64_t channel = unit % shape.groups * width + k;
            body(Run{channel, piece, (unit * width + k) * shape.positions + begin, size});
        }
    }
    // The whole chunk as one run: its channels lie side by side.
    Run run(std::int64_t unit, std::int64_t chunk) const {
        Run whole{0, 0, 0, 0};
        for_each_run(unit, chunk, [&](const Run& run) {
            if (whole.size == 0) whole.offset = run.offset;
            whole.size += run.size;
        });
        return whole;
    }

    GroupNormShape shape;
    std::int64_t channels;  // of a chunk, the last may have fewer
    std::int64_t pieces;    // that a channel is cut into
    std::int64_t chunks;
};

// --- statistics ---

void join(Moments& whole, const Moments& part) {  // Chan, Golub & LeVeque 1979
    if (part.count == 0.0) return;
    const double total = whole.count + part.count, delta = part.mean - whole.mean;
    whole.mean += delta * (part.count / total);
    whole.squares += part.squares + delta * (delta * (whole.count * part.count / total));
    whole.count = total;
}

// Of a run of memory, folded into rows of kLanes.
template <typename T>
Moments moments_of_run(const T* x, std::int64_t size) {
    float mean[kLanes], squares[kLanes], pivot[kLanes];
    Moments found;
    for (const Rows rows : {Rows{size / kLanes, kLanes}, Rows{1, size % kLanes}}) {
        if (rows.count == 0 || rows.columns == 0) continue;
        loops(T{}).moments(rows, x, mean, squares, pivot);
        join(found, loops(T{}).joined(rows, mean, squares));
        x += rows.count * rows.columns;
    }
    return found;
}

template <typename T>
void finish_group(const GroupNorm<T>& op, std::int64_t index, const Moments& found) {
    const double variance = found.squares / found.count;
    op.mean[index] = static_cast<float>(found.mean);
    op.rstd[index] = static_cast<float>(1.0 / std::sqrt(variance + op.eps));
}

// Of one channel; weight and bias may be null.
const float* at(const float* parameter, std::int64_t channel) {
    return parameter ? parameter + channel : nullptr;
}

struct ChannelAffine {
    float scale;
    float shift;
};

template <typename Op>
ChannelAffine channel_affine(const Op& op, std::int64_t channel, double mean, float rstd) {
    ChannelAffine found;
    loops(*op.x).affine(1, at(op.weight, channel), at(op.bias, channel), mean, rstd, &found.scale,
                        &found.shift);
    return found;
}

Affine per_column(const float* scale, const float* shift) {
    return {{scale, false}, {shift, false}};
}
Affine shared(const ChannelAffine& affine) {
    return {{&affine.scale, true}, {&affine.shift, true}};
}

// --- forward ---

template <typename T>
void forward(const GroupNorm<T>& op, const ChannelsLast& cut) {
    const GroupNormShape& shape = op.shape;
    const std::int64_t C = shape.channels, G = shape.groups, D = shape.group_width();
    std::vector<Moments> partial(cut.units() * cut.chunks * G);
    std::vector<float> scale(cut.units() * C), shift(cut.units() * C);

    const auto first = [&](std::int64_t image, std::int64_t chunk) {
        thread_local std::vector<float> columns;
        columns.resize(3 * C);
        float *mean = columns.data(), *squares = mean + C, *pivot = squares + C;
        const Rows rows = cut.block(chunk);
        loops(T{}).moments(rows, op.x + cut.offset(image, chunk), mean, squares, pivot);
        Moments* found = &partial[(image * cut.chunks + chunk) * G];
        for (std::int64_t g = 0; g < G; ++g)
            found[g] = loops(T{}).joined({rows.count, D}, mean + g * D, squares + g * D);
    };
    const auto between = [&](std::int64_t image) {
        for (std::int64_t g = 0; g < G; ++g) {
            Moments whole;
            for (std::int64_t chunk = 0; chunk < cut.chunks; ++chunk)
                join(whole, partial[(image * cut.chunks + chunk) * G + g]);
            const std::int64_t index = image * G + g;
            finish_group(op, index, whole);
            const std::int64_t c = g * D, own = image * C + c;
            loops(T{}).affine(D, at(op.weight, c), at(op.bias, c), whole.mean, op.rstd[index],
                              &scale[own], &shift[own]);
        }
    };
    const auto second = [&](std::int64_t image, std::int64_t chunk) {
        const std::int64_t at = cut.offset(image, chunk);
        loops(T{}).normalise(cut.block(chunk), op.x + at,
                             per_column(&scale[image * C], &shift[image * C]), op.silu, op.y + at);
    };
    two_passes({cut.units(), cut.chunks, cut.unit_size()}, first, between, second);
}

template <typename T>
void forward(const GroupNorm<T>& op, const ChannelsFirst& cut) {
    std::vector<Moments> partial(cut.units() * cut.chunks);

    const auto first = [&](std::int64_t unit, std::int64_t chunk) {
        const ChannelsFirst::Run run = cut.run(unit, chunk);
        partial[unit * cut.chunks + chunk] = moments_of_run(op.x + run.offset, run.size);
    };
    const auto between = [&](std::int64_t unit) {
        Moments& whole = partial[unit * cut.chunks];
        for (std::int64_t chunk = 1; chunk < cut.chunks; ++chunk)
            join(whole, partial[unit * cut.chunks + chunk]);
        finish_group(op, unit, whole);
    };
    const auto second = [&](std::int64_t unit, std::int64_t chunk) {
        const double mean = partial[unit * cut.chunks].mean;
        cut.for_each_run(unit, chunk, [&](const ChannelsFirst::Run& run) {
            const ChannelAffine affine = channel_affine(op, run.channel, mean, op.rstd[unit]);
            loops(T{}).normalise({1, run.size}, op.x + run.offset, shared(affine), op.silu,
                                 op.y + run.offset);
        });
    };
    two_passes({cut.units(), cut.chunks, cut.unit_size()}, first, between, second);
}

// --- backward ---

// Sums over the positions of one channel of one image.
struct ChannelSums {
    double grad_z = 0.0;   // of grad_z
    double product = 0.0;  // of grad_z (x - mean)
};

// With N elements in the group, dx = rstd (weight grad_z - m[...] - xhat m[... xhat]) is linear in
// grad_z and x; these are the group's two coefficients beside the channel's scale.
struct GroupGradient {
    float x_factor;
    float constant;
};

GroupGradient group_gradient(const ChannelSums* sums, const float* weight, std::int64_t width,
                             double mean, double rstd, double size) {
    double grad_xhat = 0.0, product = 0.0;
    for (std::int64_t k = 0; k < width; ++k) {
        const double w = weight ? weight[k] : 1.0;
        grad_xhat += w * sums[k].grad_z;
        product += w * sums[k].product;
    }
    const float x_factor = static_cast<float>(-rstd * rstd * rstd * product / size);
    return {x_factor, static_cast<float>(-rstd * grad_xhat / size - mean * x_factor)};
}

// The gradients of weight and bias: over the batch, in its order.
template <typename T>
void parameter_gradients(const GroupNormBackward<T>& op, const std::vector<ChannelSums>& sums) {
    if (!op.grad_weight && !op.grad_bias) return;
    const GroupNormShape& shape = op.shape;
    for (std::int64_t c = 0; c < shape.channels; ++c) {
        double weight = 0.0, bias = 0.0;
        // Groups of no positions have no deviation, and nothing to add.
        for (std::int64_t image = 0; shape.positions > 0 && image < shape.batch; ++image) {
            const ChannelSums& own = sums[image * shape.channels + c];
            weight += own.product * op.rstd[image * shape.groups + c / shape.group_width()];
            bias += own.grad_z;
        }
        if (op.grad_weight) op.grad_weight[c] = static_cast<float>(weight);
        if (op.grad_bias) op.grad_bias[c] = static_cast<float>(bias);
    }
}

// Where the first pass leaves the gradient of z for the second one, so that no SiLU is computed
// twice: in grad_x, where that holds it as computed.
float* kept_grad_z(const GroupNormBackward<float>& op) { return op.silu ? op.grad_x : nullptr; }
float* kept_grad_z(const GroupNormBackward<math::BFloat16>&) { return nullptr; }

// The first pass over some rows.
template <typename T>
void sums(const GroupNormBackward<T>& op, Rows rows, std::int64_t at, Affine affine,
          Coefficients centre, float* sums, float* products) {
    float* kept = kept_grad_z(op);
    const bool exact = op.grad_weight || op.grad_bias;
    loops(T{}).sums(rows, op.grad + at, op.x + at, affine, centre, {op.silu, exact}, sums, products,
                    kept ? kept + at : nullptr);
}

// The second one.
template <typename T>
void input_gradient(const GroupNormBackward<T>& op, Rows rows, std::int64_t at, Affine affine,
                    InputGradient gradient) {
    const bool kept = kept_grad_z(op) != nullptr;
    loops(T{}).input_gradient(rows, (kept ? op.grad_x : op.grad) + at, op.x + at, affine, gradient,
                              op.silu && !kept, op.grad_x + at);
}

template <typename T>
void backward(const GroupNormBackward<T>& op, const ChannelsLast& cut) {
    const GroupNormShape& shape = op.shape;
    const std::int64_t C = shape.channels, G = shape.groups, D = shape.group_width();
    // Per image: scale, shift, mean, and later x_factor and constant, of each channel.
    std::vector<float> coefficients(cut.units() * 5 * C);
    std::vector<float> partial(cut.units() * cut.chunks * 2 * C);
    std::vector<ChannelSums> whole(cut.units() * C);
    for (std::int64_t image = 0; image < shape.batch; ++image) {
        float* own = &coefficients[image * 5 * C];
        for (std::int64_t g = 0; g < G; ++g) {
            const float mean = op.mean[image * G + g], rstd = op.rstd[image * G + g];
            const std::int64_t c = g * D;
            loops(T{}).affine(D, at(op.weight, c), at(op.bias, c), mean, rstd, own + c,
                              own + C + c);
            std::fill_n(own + 2 * C + c, D, mean);
        }
    }

    const auto first = [&](std::int64_t image, std::int64_t chunk) {
        const std::int64_t at = cut.offset(image, chunk);
        const float* own = &coefficients[image * 5 * C];
        float* found = &partial[(image * cut.chunks + chunk) * 2 * C];
        sums(op, cut.block(chunk), at, per_column(own, own + C), {own + 2 * C, false}, found,
             found + C);
    };
    const auto between = [&](std::int64_t image) {
        ChannelSums* own = &whole[image * C];
        for (std::int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
            const float* found = &partial[(image * cut.chunks + chunk) * 2 * C];
            for (std::int64_t c = 0; c < C; ++c) {
                own[c].grad_z += found[c];
                own[c].product += found[C + c];
            }
        }
        for (std::int64_t g = 0; g < G; ++g) {
            const std::int64_t index = image * G + g;
            const GroupGradient gradient = group_gradient(
                own + g * D, op.weight ? op.weight + g * D : nullptr, D, op.mean[index],
                op.rstd[index], static_cast<double>(shape.group_size()));
            float* x_factor = &coefficients[(image * 5 + 3) * C];
            std::fill_n(x_factor + g * D, D, gradient.x_factor);
            std::fill_n(x_factor + C + g * D, D, gradient.constant);
        }
    };
    const auto second = [&](std::int64_t image, std::int64_t chunk) {
        if (!op.grad_x) return;
        const std::int64_t at = cut.offset(image, chunk);
        const float* own = &coefficients[image * 5 * C];
        input_gradient(op, cut.block(chunk), at, per_column(own, own + C),
                       {{own + 3 * C, false}, {own + 4 * C, false}});
    };
    two_passes({cut.units(), cut.chunks, 2 * cut.unit_size()}, first, between, second);
    parameter_gradients(op, whole);
}

// Of a run of memory, folded into rows of kLanes.
template <typename T>
ChannelSums sums_of_run(const GroupNormBackward<T>& op, std::int64_t at, std::int64_t size,
                        const ChannelAffine& affine, const float& mean) {
    ChannelSums found;
    for (const Rows rows : {Rows{size / kLanes, kLanes}, Rows{1, size % kLanes}}) {
        float grad_z[kLanes] = {}, product[kLanes] = {};
        sums(op, rows, at, shared(affine), {&mean, true}, grad_z, product);
        for (std::int64_t c = 0; c < rows.columns; ++c) {
            found.grad_z += grad_z[c];
            found.product += product[c];
        }
        at += rows.count * rows.columns;
    }
    return found;
}

template <typename T>
void backward(const GroupNormBackward<T>& op, const ChannelsFirst& cut) {
    const GroupNormShape& shape = op.shape;
    const std::int64_t D = shape.group_width(), C = shape.channels;
    std::vector<ChannelSums> partial(shape.batch * C * cut.pieces);
    std::vector<ChannelSums> whole(shape.batch * C);
    std::vector<GroupGradient> gradients(cut.units());
    const auto at = [&](std::int64_t unit, std::int64_t channel) {
        return unit / shape.groups * C + channel;
    };

    const auto first = [&](std::int64_t unit, std::int64_t chunk) {
        cut.for_each_run(unit, chunk, [&](const ChannelsFirst::Run& run) {
            const ChannelAffine affine =
                channel_affine(op, run.channel, op.mean[unit], op.rstd[unit]);
            partial[at(unit, run.channel) * cut.pieces + run.piece] =
                sums_of_run(op, run.offset, run.size, affine, op.mean[unit]);
        });
    };
    const auto between = [&](std::int64_t unit) {
        const std::int64_t channel = unit % shape.groups * D;
        ChannelSums* own = &whole[at(unit, channel)];
        for (std::int64_t k = 0; k < D; ++k) {
            for (std::int64_t piece = 0; piece < cut.pieces; ++piece) {
                const ChannelSums& found = partial[at(unit, channel + k) * cut.pieces + piece];
                own[k].grad_z += found.grad_z;
                own[k].product += found.product;
            }
        }
        gradients[unit] =
            group_gradient(own, op.weight ? op.weight + channel : nullptr, D, op.mean[unit],
                           op.rstd[unit], static_cast<double>(shape.group_size()));
    };
    const auto second = [&](std::int64_t unit, std::int64_t chunk) {
        if (!op.grad_x) return;
        const GroupGradient& gradient = gradients[unit];
        cut.for_each_run(unit, chunk, [&](const ChannelsFirst::Run& run) {
            const ChannelAffine affine =
                channel_affine(op, run.channel, op.mean[unit], op.rstd[unit]);
            input_gradient(op, {1, run.size}, run.offset, shared(affine),
                           {{&gradient.x_factor, true}, {&gradient.constant, true}});
        });
    };
    two_passes({cut.units(), cut.chunks, 2 * cut.unit_size()}, first, between, second);
    parameter_gradients(op, whole);
}

template <typename Op, typename Run>
void in_layout(const Op& op, const Run& run) {
    // One position is both; one row of all channels is better than many of one element.
    if (op.shape.channels_last || op.shape.positions == 1) return run(op, ChannelsLast(op.shape));
    run(op, ChannelsFirst(op.shape));
}

const auto run_forward = [](const auto& op, const auto& cut) { forward(op, cut); };
const auto run_backward = [](const auto& op, const auto& cut) { backward(op, cut); };

}  // namespace

void run(const GroupNorm<float>& op) { in_layout(op, run_forward); }
void run(const GroupNorm<math::BFloat16>& op) { in_layout(op, run_forward); }
void run(const GroupNormBackward<float>& op) { in_layout(op, run_backward); }
void run(const GroupNormBackward<math::BFloat16>& op) { in_layout(op, run_backward); }

}  // namespace rewardprop::cpu
