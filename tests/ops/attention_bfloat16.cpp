// Attention of bfloat16 on pairs or tiles, as processors with AVX512-BF16 or AMX run it, for any
// processor: built with REWARDPROP_PAIRS or REWARDPROP_TILES by test_attention_bfloat16.py, which
// calls these two.
#include "attention.h"

using rewardprop::cpu::Attention;
using rewardprop::cpu::AttentionBackward;
using rewardprop::cpu::Rows;
using rewardprop::math::BFloat16;

namespace {

// (H, L, D), dense.
template <typename T>
Rows<T> dense(T* data, std::int64_t length, std::int64_t width) {
    return {data, 0, length * width, width};
}

}  // namespace

extern "C" void attention_forward(std::int64_t heads, std::int64_t queries, std::int64_t keys,
                                  std::int64_t width, float scale, const BFloat16* q,
                                  const BFloat16* k, const BFloat16* v, BFloat16* out, float* lse) {
    const Attention<BFloat16> op{dense(q, queries, width),
                                 dense(k, keys, width),
                                 dense(v, keys, width),
                                 dense(out, queries, width),
                                 lse,
                                 heads,
                                 queries,
                                 keys,
                                 width,
                                 scale};
    rewardprop::cpu::run(op, 1);
}

extern "C" void attention_backward(std::int64_t heads, std::int64_t queries, std::int64_t keys,
                                   std::int64_t width, float scale, const BFloat16* grad,
                                   const BFloat16* q, const BFloat16* k, const BFloat16* v,
                                   const BFloat16* out, const float* lse, BFloat16* dq,
                                   BFloat16* dk, BFloat16* dv) {
    AttentionBackward<BFloat16> op{};
    op.grad = dense(grad, queries, width);
    op.q = dense(q, queries, width);
    op.k = dense(k, keys, width);
    op.v = dense(v, keys, width);
    op.out = dense(out, queries, width);
    op.lse = lse;
    op.dq = dense(dq, queries, width);
    op.dk = dense(dk, keys, width);
    op.dv = dense(dv, keys, width);
    op.heads = heads;
    op.queries = queries;
    op.keys = keys;
    op.width = width;
    op.scale = scale;
    rewardprop::cpu::run(op, 1);
}
