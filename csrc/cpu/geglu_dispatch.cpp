// Picks the instruction set's loops at run time and shares them out over the threads.
#include "dispatch.h"
#include "geglu.h"
#include "parallel.h"

namespace rewardprop::cpu {

namespace {

const GegluLoops& loops() { return REWARDPROP_SELECT(geglu_loops); }

template <typename Op>
void share_out(void (*loop)(const Op&, std::int64_t, std::int64_t), const Op& op,
               std::int64_t count) {
    parallel_for(count, [&](std::int64_t begin, std::int64_t end) { loop(op, begin, end); });
}

}  // namespace

void run(const Geglu<float>& op, std::int64_t count) { share_out(loops().forward_f32, op, count); }
void run(const Geglu<math::BFloat16>& op, std::int64_t count) {
    share_out(loops().forward_bf16, op, count);
}
void run(const GegluBackward<float>& op, std::int64_t count) {
    share_out(loops().backward_f32, op, count);
}
void run(const GegluBackward<math::BFloat16>& op, std::int64_t count) {
    share_out(loops().backward_bf16, op, count);
}

}  // namespace rewardprop::cpu
