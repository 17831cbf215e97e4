// The loops of attention, compiled once per instruction set with REWARDPROP_ISA naming it (scalar,
// avx2, avx512, avx512_bf16). Softmax and all sums are float32, whatever the tensors hold. Products
// of bfloat16 are float32's, it being widened while it is packed, or, where the processor has an
// instruction for them, bfloat16's own, for which weights and their gradients are rounded to it.
//
// FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, with the tiles of a CPU's caches:
// products run on packed copies whose rows are whole vectors, so they have no edges.
#include "../math/normal.h"
#include "attention.h"
#include "attention_packing.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kLeastPower = -126.0f;  // 2^-126 is the least normal number; below counts as zero

float infinity() { return __builtin_inff(); }

template <typename T>
const T* row_of(const Rows<const T>& rows, std::int64_t heads, std::int64_t head,
                std::int64_t row) {
    return rows.data + head / heads * rows.batch_stride + head % heads * rows.head_stride +
           row * rows.row_stride;
}

template <typename T>
T* row_of(const Rows<T>& rows, std::int64_t heads, std::int64_t head, std::int64_t row) {
    return rows.data + head / heads * rows.batch_stride + head % heads * rows.head_stride +
           row * rows.row_stride;
}

template <typename T>
void unpack(const float* __restrict from, float factor, T* __restrict to, std::int64_t width) {
    for (std::int64_t d = 0; d < width; ++d) math::store(factor * from[d], to + d);
}

// How many items hold so many numbers.
template <typename P>
constexpr std::int64_t items(std::int64_t count) {
    return (count + P::kEach - 1) / P::kEach;
}

// Where a product's results lie as an operand: where they are, or at `elsewhere`.
template <typename P>
typename P::Item* operand(float* results, float* elsewhere) {
    return reinterpret_cast<typename P::Item*>(P::kInPlace ? results : elsewhere);
}

// 2^x for x <= 0; a NaN stays one.
float power(float x) {
    const float value = math::exp2_of_negative(x < kLeastPower ? kLeastPower : x);
    return x < kLeastPower ? 0.0f : value;
}

// Scales a row of scores in place, sets what lies past the keys to -inf, and gives its maximum.
float scale_row(float* __restrict scores, std::int64_t keys, std::int64_t padded, float factor) {
    for (std::int64_t i = 0; i < padded; ++i) scores[i] *= factor;
    for (std::int64_t i = keys; i < padded; ++i) scores[i] = -infinity();
    Vector most = broadcast(-infinity());
    for (std::int64_t i = 0; i < padded; i += kLanes) {
        const Vector value = load(scores + i);
        most = value > most ? value : most;
    }
    float result = most[0];
    for (int i = 1; i < kLanes; ++i) result = most[i] > result ? most[i] : result;
    return result;
}

// Scores become weights 2^(score - maximum); gives their sum.
float weigh_row(float* __restrict scores, std::int64_t padded, float maximum) {
    for (std::int64_t i = 0; i < padded; ++i) scores[i] = power(scores[i] - maximum);
    Vector sums{};
    for (std::int64_t i = 0; i < padded; i += kLanes) sums += load(scores + i);
    float result = 0.0f;
    for (int i = 0; i < kLanes; ++i) result += sums[i];
    return result;
}

// What to subtract: 0 where all scores are -inf, so that their weights are 0 and not NaN.
float above(float maximum) { return maximum == -infinity() ? 0.0f : maximum; }

template <typename T>
void forward(const Attention<T>& op, const AttentionPart& part, float* scratch) {
    using P = typename PackingOf<T>::Type;
    using Item = typename P::Item;
    const std::int64_t width = op.width, step = round_up(width, kPad), tile = key_tile(width);
    const std::int64_t columns = round_up(width, kLanes), depth = items<P>(width);
    const float factor = op.scale * kLog2E;
    Item* keys_turned = reinterpret_cast<Item*>(scratch);  // of one tile after another
    Item* values = keys_turned + depth * round_up(op.keys, kPad);
    Item* queries = values + items<P>(op.keys) * step;
    float* sums = reinterpret_cast<float*>(queries + kQueryTile * items<P>(step));
    float* scores = sums + kQueryTile * step;
    Item* weights = operand<P>(scores, scores + kQueryTile * tile);
    for (std::int64_t key = 0; key < op.keys; key += tile) {
        const std::int64_t count = op.keys - key < tile ? op.keys - key : tile;
        P::turned(row_of(op.k, op.heads, part.head, key), op.k.row_stride, count, width,
                  keys_turned + depth * key, round_up(count, kPad));
    }
    P::stacked(row_of(op.v, op.heads, part.head, 0), op.v.row_stride, op.keys, op.keys, width,
               values, step);
    for (std::int64_t first = part.first_query; first < part.last_query; first += kQueryTile) {
        const std::int64_t left = part.last_query - first;
        const std::int64_t count = left < kQueryTile ? left : kQueryTile;
        const std::int64_t rows = round_up(count, kRows);
        P::rows(row_of(op.q, op.heads, part.head, first), op.q.row_stride, count, rows, width,
                queries, items<P>(step));
        float maximum[kQueryTile], total[kQueryTile];
        for (std::int64_t key = 0; key < op.keys; key += tile) {
            const std::int64_t key_count = op.keys - key < tile ? op.keys - key : tile;
            const std::int64_t padded = round_up(key_count, kPad);
            product<P, false>(queries, items<P>(step), keys_turned + depth * key, padded, scores,
                              padded, rows, padded, depth, false);
            for (std::int64_t i = 0; i < rows; ++i) {
                float* row = scores + i * padded;
                const float highest = scale_row(row, key_count, padded, factor);
                if (key == 0) {
                    maximum[i] = highest;
                    total[i] = weigh_row(row, padded, above(highest));
                } else {
                    const float before = maximum[i];
                    if (highest > before) {
                        const float shrink = power(before - above(highest));
                        maximum[i] = highest;
                        total[i] *= shrink;
                        for (std::int64_t d = 0; d < columns; ++d) sums[i * step + d] *= shrink;
                    }
                    total[i] += weigh_row(row, padded, above(maximum[i]));
                }
                if constexpr (!P::kInPlace) P::round(row, padded, weights + i * items<P>(padded));
            }
            product<P, false>(weights, items<P>(padded), values + items<P>(key) * step, step, sums,
                              step, rows, columns, items<P>(key_count), key > 0);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            unpack(sums + i * step, 1.0f / total[i], row_of(op.out, op.heads, part.head, first + i),
                   width);
            op.lse[part.head * op.queries + first + i] =
                kLn2 * above(maximum[i]) + __builtin_logf(total[i]);
        }
    }
}

// delta = sum_d dO O.
template <typename T>
float dot_row(const T* __restrict a, const T* __restrict b, std::int64_t width) {
    float lanes[kPad] = {};
    std::int64_t d = 0;
    for (; d + kPad <= width; d += kPad) {
        for (std::int64_t i = 0; i < kPad; ++i)
            lanes[i] += math::to_float(a[d + i]) * math::to_float(b[d + i]);
    }
    float result = 0.0f;
    for (; d < width; ++d) result += math::to_float(a[d]) * math::to_float(b[d]);
    for (float lane : lanes) result += lane;
    return result;
}

// Scores become weights 2^(factor score - lse2), and dP becomes dS = P (dP - delta).
void weigh_row_backward(float* __restrict scores, float* __restrict dscores, std::int64_t padded,
                        float factor, float lse2, float delta) {
    // Rounded before the subtraction, as the forward pass has it: where scores are large, weights
    // of both passes would otherwise differ from key to key, and dS no longer sum up to zero.
    for (std::int64_t i = 0; i < padded; ++i) scores[i] *= factor;
    for (std::int64_t i = 0; i < padded; ++i) {
        const float weight = power(scores[i] - lse2);
        scores[i] = weight;
        dscores[i] = weight * (dscores[i] - delta);
    }
}

template <typename T>
void backward(const AttentionBackward<T>& op, const AttentionPart& part, float* scratch) {
    using P = typename PackingOf<T>::Type;
    using Item = typename P::Item;
    const std::int64_t width = op.width, step = round_up(width, kPad), tile = key_tile(width);
    const std::int64_t columns = round_up(width, kLanes), depth = items<P>(width);
    const std::int64_t row_step = items<P>(step);
    const float factor = op.scale * kLog2E;
    const std::int64_t count = part.last_query - part.first_query;
    const std::int64_t query_rows = round_up(count, kQueryTile);
    // Left operands, and right ones, which are the same or take the rest of the same memory.
    Item* queries = reinterpret_cast<Item*>(scratch);
    Item* grads = queries + query_rows * row_step;
    Item* right_queries = P::kStackedAreRows ? queries : grads + query_rows * row_step;
    Item* right_grads = right_queries + items<P>(query_rows) * step;
    float* dqueries = scratch + 2 * query_rows * step;
    float* lse2 = dqueries + query_rows * step;
    float* delta = lse2 + query_rows;
    Item* keys_turned = reinterpret_cast<Item*>(delta + query_rows);
    Item* values_turned = keys_turned + depth * tile;
    Item* keys = values_turned + depth * tile;
    float* dkeys = reinterpret_cast<float*>(keys + items<P>(tile) * step);
    float* dvalues = dkeys + tile * step;
    float* scores = dvalues + tile * step;
    float* dscores = scores + kQueryTile * tile;
    float* rounded = dscores + kQueryTile * tile;
    Item* weights_turned = operand<P>(scores, rounded);
    Item* dscores_turned = operand<P>(dscores, rounded + kQueryTile / 2 * tile);
    Item* dscores_rows = operand<P>(dscores, rounded + kQueryTile * tile);

    const T* q_rows = row_of(op.q, op.heads, part.head, part.first_query);
    const T* grad_rows = row_of(op.grad, op.heads, part.head, part.first_query);
    P::rows(q_rows, op.q.row_stride, count, query_rows, width, queries, row_step);
    P::rows(grad_rows, op.grad.row_stride, count, query_rows, width, grads, row_step);
    if constexpr (!P::kStackedAreRows) {
        P::stacked(q_rows, op.q.row_stride, count, query_rows, width, right_queries, step);
        P::stacked(grad_rows, op.grad.row_stride, count, query_rows, width, right_grads, step);
    }
    for (std::int64_t i = 0; i < query_rows; ++i) {
        // A query that is not there weighs 2^-inf = 0.
        const std::int64_t query = part.first_query + i;
        lse2[i] = i < count ? kLog2E * op.lse[part.head * op.queries + query] : infinity();
        delta[i] = i < count && (part.dq || part.dk)
                       ? dot_row(row_of(op.grad, op.heads, part.head, query),
                                 row_of(op.out, op.heads, part.head, query), width)
                       : 0.0f;
    }
    for (std::int64_t key = part.first_key; key < part.last_key; key += tile) {
        const std::int64_t left = part.last_key - key;
        const std::int64_t key_count = left < tile ? left : tile;
        const std::int64_t padded = round_up(key_count, kPad);
        P::turned(row_of(op.k, op.heads, part.head, key), op.k.row_stride, key_count, width,
                  keys_turned, padded);
        if (part.dq || part.dk) {
            P::turned(row_of(op.v, op.heads, part.head, key), op.v.row_stride, key_count, width,
                      values_turned, padded);
        }
        if (part.dq) {
            P::stacked(row_of(op.k, op.heads, part.head, key), op.k.row_stride, key_count,
                       key_count, width, keys, step);
        }
        for (std::int64_t i = 0; count == 0 && i < key_count * step; ++i)
            dkeys[i] = dvalues[i] = 0.0f;
        for (std::int64_t first = 0; first < count; first += kQueryTile) {
            const std::int64_t rest = count - first;
            const std::int64_t rows = round_up(rest < kQueryTile ? rest : kQueryTile, kRows);
            product<P, false>(queries + first * row_step, row_step, keys_turned, padded, scores,
                              padded, rows, padded, depth, false);
            if (part.dq || part.dk) {
                product<P, false>(grads + first * row_step, row_step, values_turned, padded,
                                  dscores, padded, rows, padded, depth, false);
            }
            for (std::int64_t i = 0; i < rows; ++i) {
                float* row = scores + i * padded;
                float* drow = dscores + i * padded;
                weigh_row_backward(row, drow, padded, factor, lse2[first + i], delta[first + i]);
                if constexpr (!P::kInPlace) {
                    P::round(drow, padded, dscores_rows + i * items<P>(padded));
                    if (i % 2 == 0) continue;
                    P::round(row - padded, row, padded, weights_turned + i / 2 * padded);
                    P::round(drow - padded, drow, padded, dscores_turned + i / 2 * padded);
                }
            }
            const std::int64_t key_rows = round_up(key_count, kRows);
            if (part.dv) {
                product<P, true>(weights_turned, padded, right_grads + items<P>(first) * step, step,
                                 dvalues, step, key_rows, columns, items<P>(rows), first > 0);
            }
            if (part.dk) {
                product<P, true>(dscores_turned, padded, right_queries + items<P>(first) * step,
                                 step, dkeys, step, key_rows, columns, items<P>(rows), first > 0);
            }
            if (part.dq) {
                product<P, false>(dscores_rows, items<P>(padded), keys, step,
                                  dqueries + first * step, step, rows, columns, items<P>(key_count),
                                  key > part.first_key);
            }
        }
        for (std::int64_t i = 0; i < key_count; ++i) {
            if (part.dk) {
                unpack(dkeys + i * step, op.scale, row_of(op.dk, op.heads, part.head, key + i),
                       width);
            }
            if (part.dv) {
                unpack(dvalues + i * step, 1.0f, row_of(op.dv, op.heads, part.head, key + i),
                       width);
            }
        }
    }
    for (std::int64_t i = 0; part.dq && i < count; ++i) {
        unpack(dqueries + i * step, op.scale,
               row_of(op.dq, op.heads, part.head, part.first_query + i), width);
    }
}

}  // namespace

const AttentionLoops attention_loops = {
    forward<float>,
    forward<math::BFloat16>,
    backward<float>,
    backward<math::BFloat16>,
};

}  // namespace rewardprop::cpu::REWARDPROP_ISA
