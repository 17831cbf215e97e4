// Picks the instruction set's loops at run time and shares out heads, queries and keys over the
// threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "parallel.h"

namespace rewardprop::cpu {

namespace {

constexpr std::int64_t kPad = 32;    // the largest of any instruction set
constexpr std::int64_t kBlock = 16;  // keys whose gradients are transposed together
constexpr std::int64_t kLine = 16;   // floats in a cache line

const AttentionLoops& loops() { return REWARDPROP_SELECT(attention_loops); }

std::int64_t round_up(std::int64_t value, std::int64_t step) {
    return (value + step - 1) / step * step;
}

// Runs every part, each thread with scratch of its own.
template <typename Op>
void run_parts(void (*loop)(const Op&, const AttentionPart&, float*), const Op& op,
               const std::vector<AttentionPart>& parts, std::int64_t scratch_floats) {
    const std::int64_t count = static_cast<std::int64_t>(parts.size());
    const int threads = static_cast<int>(std::min<std::int64_t>(max_threads(), count));
    const std::int64_t each = round_up(scratch_floats, kLine);
    std::unique_ptr<float[]> memory(new float[std::max(threads, 1) * each + kLine]);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
    float* scratch = memory.get() + (64 - address % 64) % 64 / sizeof(float);
    if (threads <= 1) {
        for (const AttentionPart& part : parts) loop(op, part, scratch);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t i = 0; i < count; ++i)
        loop(op, parts[i], scratch + omp_get_thread_num() * each);
#endif
}

// How many ranges a head is cut into so that every thread has work.
std::int64_t shares(std::int64_t all_heads) {
    return (max_threads() + all_heads - 1) / std::max<std::int64_t>(all_heads, 1);
}

// [0, count) in `shares` ranges or fewer that begin at multiples of `step`.
std::vector<std::int64_t> cuts(std::int64_t count, std::int64_t shares, std::int64_t step) {
    const std::int64_t size = round_up((count + shares - 1) / shares, step);
    std::vector<std::int64_t> result;
    for (std::int64_t begin = 0; begin < count; begin += size) result.push_back(begin);
    result.push_back(count);
    return result;
}

template <typename T>
void forward(void (*loop)(const Attention<T>&, const AttentionPart&, float*),
             const Attention<T>& op, std::int64_t batch) {
    const std::int64_t all_heads = batch * op.heads;
    if (all_heads == 0 || op.queries == 0) return;
    const std::vector<std::int64_t> ends = cuts(op.queries, shares(all_heads), kQueryTile);
    std::vector<AttentionPart> parts;
    for (std::int64_t head = 0; head < all_heads; ++head) {
        for (std::size_t i = 0; i + 1 < ends.size(); ++i)
            parts.push_back({head, ends[i], ends[i + 1], 0, op.keys, false, false, false});
    }
    run_parts(loop, op, parts, attention_scratch(op.keys, op.width));
}

// Where there are more threads than heads, some compute dK and dV for a range of keys and others dQ
// for a range of queries; the scores are then computed twice.
template <typename T>
void backward(void (*loop)(const AttentionBackward<T>&, const AttentionPart&, float*),
              const AttentionBackward<T>& op, std::int64_t batch) {
    const std::int64_t all_heads = batch * op.heads;
    if (all_heads == 0) return;
    const bool dq = op.dq.data != nullptr, dk = op.dk.data != nullptr, dv = op.dv.data != nullptr;
    const std::int64_t pieces = shares(all_heads);
    std::vector<AttentionPart> parts;
    for (std::int64_t head = 0; head < all_heads; ++head) {
        if (pieces == 1) {
            parts.push_back({head, 0, op.queries, 0, op.keys, dq, dk, dv});
            continue;
        }
        const auto keys = cuts(op.keys, pieces, key_tile(op.width));
        for (std::size_t i = 0; (dk || dv) && i + 1 < keys.size(); ++i)
            parts.push_back({head, 0, op.queries, keys[i], keys[i + 1], false, dk, dv});
        const auto queries = cuts(op.queries, pieces, kQueryTile);
        for (std::size_t i = 0; dq && i + 1 < queries.size(); ++i)
            parts.push_back({head, queries[i], queries[i + 1], 0, op.keys, true, false, false});
    }
    run_parts(loop, op, parts, attention_backward_scratch(op.queries, op.width));
}

}  // namespace

std::int64_t attention_scratch(std::int64_t keys, std::int64_t width) {
    const std::int64_t step = round_up(width, kPad), tile = round_up(key_tile(width), kPad);
    return step * round_up(keys, kPad) + round_up(keys, kPad) * step + 2 * kQueryTile * step +
           2 * kQueryTile * tile;
}

std::int64_t attention_backward_scratch(std::int64_t queries, std::int64_t width) {
    const std::int64_t step = round_up(width, kPad), tile = round_up(key_tile(width), kPad);
    return round_up(queries, kQueryTile) * (3 * step + 2) + 2 * step * tile + 5 * tile * step +
           4 * kQueryTile * tile + kBlock * step;
}

void run(const Attention<float>& op, std::int64_t batch) {
    forward(loops().forward_f32, op, batch);
}
void run(const Attention<math::BFloat16>& op, std::int64_t batch) {
    forward(loops().forward_bf16, op, batch);
}
void run(const AttentionBackward<float>& op, std::int64_t batch) {
    backward(loops().backward_f32, op, batch);
}
void run(const AttentionBackward<math::BFloat16>& op, std::int64_t batch) {
    backward(loops().backward_bf16, op, batch);
}

}  // namespace rewardprop::cpu
