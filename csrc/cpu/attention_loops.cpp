// The loops of attention, compiled once per instruction set with REWARDPROP_ISA naming it (scalar,
// avx2, avx512, avx512_bf16, amx). Softmax and all sums are float32, whatever the tensors hold.
// Products of bfloat16 are float32's, it being widened while it is packed, or, where the processor
// has instructions for them, bfloat16's own, for which weights and their gradients are rounded to
// it.
//
// FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, with the tiles of a CPU's caches:
// products run on packed copies whose rows are whole vectors, so they have no edges.
#include "attention.h"
#include "attention_packing.h"

namespace rewardprop::cpu::REWARDPROP_ISA {

namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
// Gradients of keys are summed over so many queries, and those sums once more: a chain of 2^16
// additions would lose what PyTorch's blocks keep.
constexpr std::int64_t kQueriesOfASum = 2048;
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

// Where a product's results lie as an operand: where they are, or at `elsewhere`.
template <typename P>
typename P::Item* operand(float* results, float* elsewhere) {
    return reinterpret_cast<typename P::Item*>(P::kInPlace ? results : elsewhere);
}

// 2^x for x <= 0; a NaN stays one. math/normal.h explains it for a single number: left to the
// compiler, loops over that would make a pass over the row each, as sums are not to be reordered.
Vector power(Vector x) {
    constexpr float kToInteger = 12582912.0f;
    const Vector y = x < kLeastPower ? broadcast(kLeastPower) : x;
    const Vector shifted = y + kToInteger;
    const Vector f = y - (shifted - kToInteger);
    Vector p = 1.53533401e-4f * f + 1.33989006e-3f;
    p = p * f + 9.61843785e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226477e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    const Bits bits = (load_as<Bits>(&shifted) + 127u) << 23;
    return x < kLeastPower ? Vector{} : p * load_as<Vector>(&bits);
}

float power(float x) { return power(broadcast(x))[0]; }

// What to add to a vector of which so many keys are there: 0, and -inf past them.
Vector past(std::int64_t keys) {
    static constexpr struct Table {
        float at[2 * kLanes];
        constexpr Table() : at() {
            for (int i = 0; i < kLanes; ++i) at[kLanes + i] = -__builtin_inff();
        }
    } table;
    return load(table.at + kLanes - (keys < 0 ? 0 : keys));
}

// A row's scaled scores less `by` at `i`, in one rounding where the processor has such: then scores
// that are large lose nothing to the product.
Vector scaled(const float* scores, std::int64_t i, std::int64_t keys, float factor, float by) {
    const Vector value = load(scores + i) * factor - by;
    return i + kLanes <= keys ? value : value + past(keys - i);
}

// The maximum of a row's scaled scores.
float highest_of(const float* scores, std::int64_t keys, float factor) {
    Vector most = broadcast(-infinity());
    for (std::int64_t i = 0; i < keys; i += kLanes) {
        const Vector value = scaled(scores, i, keys, factor, 0.0f);
        most = value > most ? value : most;
    }
    float result = most[0];
    for (int i = 1; i < kLanes; ++i) result = most[i] > result ? most[i] : result;
    return result;
}

// Scores become weights 2^(factor score - maximum), 0 past the keys; gives their sum.
float weigh_row(float* __restrict scores, std::int64_t keys, std::int64_t padded, float factor,
                float maximum) {
    Vector sums{};
    for (std::int64_t i = 0; i < padded; i += kLanes) {
        const Vector weight = power(scaled(scores, i, keys, factor, maximum));
        save(weight, scores + i);
        sums += weight;
    }
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
    const std::int64_t width = op.width, step = round_up(width, P::kPad);
    const std::int64_t tile = round_up(key_tile(width), P::kPad);
    const std::int64_t columns = round_up(width, kLanes), depth = items<P>(width);
    const float factor = op.scale * kLog2E;
    const typename P::Use use;
    Item* keys_turned = reinterpret_cast<Item*>(scratch);  // of one tile after another
    Item* values = keys_turned + depth * round_up(op.keys, P::kPad);
    Item* queries = values + items<P>(op.keys) * step;
    float* sums = reinterpret_cast<float*>(queries + kQueryTile * items<P>(step));
    float* scores = sums + kQueryTile * step;
    Item* weights = operand<P>(scores, scores + kQueryTile * tile);
    for (std::int64_t key = 0; key < op.keys; key += tile) {
        const std::int64_t count = op.keys - key < tile ? op.keys - key : tile;
        P::turned(row_of(op.k, op.heads, part.head, key), op.k.row_stride, count, width,
                  keys_turned + depth * key, round_up(count, P::kPad));
    }
    P::stacked(row_of(op.v, op.heads, part.head, 0), op.v.row_stride, op.keys,
               items<P>(op.keys) * P::kEach, width, values, step);
    for (std::int64_t first = part.first_query; first < part.last_query; first += kQueryTile) {
        const std::int64_t left = part.last_query - first;
        const std::int64_t count = left < kQueryTile ? left : kQueryTile;
        const std::int64_t rows = round_up(count, P::kRows);
        P::rows(row_of(op.q, op.heads, part.head, first), op.q.row_stride, count, rows, width,
                queries, items<P>(step));
        float maximum[kQueryTile], total[kQueryTile];
        for (std::int64_t key = 0; key < op.keys; key += tile) {
            const std::int64_t key_count = op.keys - key < tile ? op.keys - key : tile;
            const std::int64_t padded = round_up(key_count, P::kPad);
            P::multiply(queries, items<P>(step), keys_turned + depth * key, padded, scores, padded,
                        rows, padded, depth, false);
            for (std::int64_t i = 0; i < rows; ++i) {
                float* row = scores + i * padded;
                const float highest = highest_of(row, key_count, factor);
                if (key == 0) {
                    maximum[i] = highest;
                    total[i] = weigh_row(row, key_count, padded, factor, above(highest));
                } else {
                    const float before = maximum[i];
                    if (highest > before) {
                        const float shrink = power(before - above(highest));
                        maximum[i] = highest;
                        total[i] *= shrink;
                        for (std::int64_t d = 0; d < columns; ++d) sums[i * step + d] *= shrink;
                    }
                    total[i] += weigh_row(row, key_count, padded, factor, above(maximum[i]));
                }
                if constexpr (!P::kInPlace) P::round(row, padded, weights + i * items<P>(padded));
            }
            P::multiply(weights, items<P>(padded), values + items<P>(key) * step, step, sums, step,
                        rows, columns, items<P>(key_count), key > 0);
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
    float lanes[kBlock] = {};
    std::int64_t d = 0;
    for (; d + kBlock <= width; d += kBlock) {
        for (std::int64_t i = 0; i < kBlock; ++i)
            lanes[i] += math::to_float(a[d + i]) * math::to_float(b[d + i]);
    }
    float result = 0.0f;
    for (; d < width; ++d) result += math::to_float(a[d]) * math::to_float(b[d]);
    for (float lane : lanes) result += lane;
    return result;
}

// Scores become weights 2^(factor score - lse2), and dP becomes dS = P (dP - delta).
void weigh_row_backward(float* __restrict scores, float* __restrict dscores, std::int64_t keys,
                        std::int64_t padded, float factor, float lse2, float delta) {
    for (std::int64_t i = 0; i < padded; i += kLanes) {
        const Vector weight = power(scaled(scores, i, keys, factor, lse2));
        save(weight, scores + i);
        save(weight * (load(dscores + i) - delta), dscores + i);
    }
}

template <typename T>
void backward(const AttentionBackward<T>& op, const AttentionPart& part, float* scratch) {
    using P = typename PackingOf<T>::Type;
    using Item = typename P::Item;
    const std::int64_t width = op.width, step = round_up(width, P::kPad);
    const std::int64_t tile = round_up(key_tile(width), P::kPad);
    const std::int64_t columns = round_up(width, kLanes), depth = items<P>(width);
    const std::int64_t row_step = items<P>(step);
    const float factor = op.scale * kLog2E;
    const typename P::Use use;
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
    float* spare = rounded + 2 * kQueryTile * tile;
    // Of dkeys and dvalues, which lie side by side.
    float* sums = count > kQueriesOfASum ? spare + kBlock * step : dkeys;
    Item* weights_turned = operand<P>(scores, rounded);
    Item* dscores_turned = operand<P>(dscores, rounded + kQueryTile / 2 * tile);
    Item* dscores_rows = operand<P>(dscores, rounded + kQueryTile * tile);

    const T* q_rows = row_of(op.q, op.heads, part.head, part.first_query);
    const T* grad_rows = row_of(op.grad, op.heads, part.head, part.first_query);
    P::rows(q_rows, op.q.row_stride, count, query_rows, width, queries, row_step);
    P::rows(grad_rows, op.grad.row_stride, count, query_rows, width, grads, row_step);
    if constexpr (!P::kStackedAreRows) {
        P::queries(q_rows, op.q.row_stride, count, query_rows, width, right_queries, step);
        P::queries(grad_rows, op.grad.row_stride, count, query_rows, width, right_grads, step);
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
        const std::int64_t padded = round_up(key_count, P::kPad);
        P::turned(row_of(op.k, op.heads, part.head, key), op.k.row_stride, key_count, width,
                  keys_turned, padded);
        if (part.dq || part.dk) {
            P::turned(row_of(op.v, op.heads, part.head, key), op.v.row_stride, key_count, width,
                      values_turned, padded);
        }
        if (part.dq) {
            P::stacked(row_of(op.k, op.heads, part.head, key), op.k.row_stride, key_count,
                       items<P>(key_count) * P::kEach, width, keys, step);
        }
        for (std::int64_t i = 0; count == 0 && i < padded * step; ++i) dkeys[i] = dvalues[i] = 0.0f;
        for (std::int64_t first = 0; first < count; first += kQueryTile) {
            const std::int64_t rest = count - first;
            const std::int64_t rows = round_up(rest < kQueryTile ? rest : kQueryTile, P::kRows);
            const bool add = first % kQueriesOfASum != 0;
            P::multiply(queries + first * row_step, row_step, keys_turned, padded, scores, padded,
                        rows, padded, depth, false);
            if (part.dq || part.dk) {
                P::multiply(grads + first * row_step, row_step, values_turned, padded, dscores,
                            padded, rows, padded, depth, false);
            }
            for (std::int64_t i = 0; i < rows; ++i) {
                float* row = scores + i * padded;
                float* drow = dscores + i * padded;
                weigh_row_backward(row, drow, key_count, padded, factor, lse2[first + i],
                                   delta[first + i]);
                if constexpr (!P::kInPlace) {
                    P::round(drow, padded, dscores_rows + i * items<P>(padded));
                    if (i % 2 == 0) continue;
                    P::round(row - padded, row, padded, weights_turned + i / 2 * padded);
                    P::round(drow - padded, drow, padded, dscores_turned + i / 2 * padded);
                }
            }
            if (part.dv) {
                P::add_over_queries(weights_turned, padded, right_grads, step, query_rows, first,
                                    dvalues, key_count, columns, rows, add);
            }
            if (part.dk) {
                P::add_over_queries(dscores_turned, padded, right_queries, step, query_rows, first,
                                    dkeys, key_count, columns, rows, add);
            }
            if (part.dq) {
                P::multiply(dscores_rows, items<P>(padded), keys, step, dqueries + first * step,
                            step, rows, columns, items<P>(key_count), key > part.first_key);
            }
            const std::int64_t next = first + kQueryTile;
            if (sums != dkeys && (next % kQueriesOfASum == 0 || next >= count)) {
                const bool anew = next <= kQueriesOfASum;
                for (std::int64_t i = 0; i < 2 * tile * step; ++i)
                    sums[i] = anew ? dkeys[i] : sums[i] + dkeys[i];
            }
        }
        const auto give = [&](const float* of, float by, const Rows<T>& to) {
            for (std::int64_t i = 0; i < key_count; i += kBlock) {
                const float* rows = P::of_keys(of, i, padded, step, columns, spare);
                for (std::int64_t j = 0; j < kBlock && i + j < key_count; ++j)
                    unpack(rows + j * step, by, row_of(to, op.heads, part.head, key + i + j),
                           width);
            }
        };
        if (part.dk) give(sums, op.scale, op.dk);
        if (part.dv) give(sums + tile * step, 1.0f, op.dv);
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
