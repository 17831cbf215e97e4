// Attention on the CPU: softmax(scale Q K^T) V and its gradients, never more than a tile of scores.
//
// Shape legend: B images, H heads, Lq queries, Lk keys, D width of a head; a head here is one of
// the B H pairs.
#pragma once

#include <cstdint>

#include "../math/bf16.h"

namespace rewardprop::cpu {

// (B, H, L, D) whose D elements lie side by side; strides count elements.
template <typename T>
struct Rows {
    T* data;
    std::int64_t batch_stride, head_stride, row_stride;
};

template <typename T>
struct Attention {
    Rows<const T> q, k, v;
    Rows<T> out;
    float* lse;  // (B, H, Lq), dense
    std::int64_t heads, queries, keys, width;
    float scale;
};

template <typename T>
struct AttentionBackward {
    Rows<const T> grad, q, k, v, out;
    const float* lse;
    Rows<T> dq, dk, dv;  // data is null where a gradient is not needed
    std::int64_t heads, queries, keys, width;
    float scale;
};

// What of one head's work a call does: the queries and keys [begin, end).
struct AttentionPart {
    std::int64_t head;
    std::int64_t first_query, last_query;
    std::int64_t first_key, last_key;  // all keys in the forward pass
    bool dq, dk, dv;                   // which gradients; each needs all of the other side
};

// Ranges of queries and keys are shared out in these steps. Sums then have the same order whoever
// computes them, and results do not depend on the number of threads.
constexpr std::int64_t kQueryTile = 32;

// Keys of a tile: as many as leave a tile's operands in the cache next to the core.
inline constexpr std::int64_t key_tile(std::int64_t width) {
    return width <= 176 ? 192 : (width <= 352 ? 96 : 48);
}

// What a call needs in floats, for so many queries and keys; `scratch` is aligned to 64 bytes.
std::int64_t attention_scratch(std::int64_t keys, std::int64_t width);
std::int64_t attention_backward_scratch(std::int64_t queries, std::int64_t width);

struct AttentionLoops {
    void (*forward_f32)(const Attention<float>&, const AttentionPart&, float* scratch);
    void (*forward_bf16)(const Attention<math::BFloat16>&, const AttentionPart&, float* scratch);
    void (*backward_f32)(const AttentionBackward<float>&, const AttentionPart&, float* scratch);
    void (*backward_bf16)(const AttentionBackward<math::BFloat16>&, const AttentionPart&,
                          float* scratch);
};

// attention_loops.cpp is compiled once per instruction set and defines one of these each time.
namespace scalar {
extern const AttentionLoops attention_loops;
}
namespace avx2 {
extern const AttentionLoops attention_loops;
}
namespace avx512 {
extern const AttentionLoops attention_loops;
}
namespace avx512_bf16 {
extern const AttentionLoops attention_loops;
}
namespace amx {
extern const AttentionLoops attention_loops;
}

// On the selected instruction set and the OpenMP pool.
void run(const Attention<float>& op, std::int64_t batch);
void run(const Attention<math::BFloat16>& op, std::int64_t batch);
void run(const AttentionBackward<float>& op, std::int64_t batch);
void run(const AttentionBackward<math::BFloat16>& op, std::int64_t batch);

}  // namespace rewardprop::cpu
