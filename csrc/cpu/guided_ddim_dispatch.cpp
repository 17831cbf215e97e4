// Picks the instruction set's loops at run time and shares them out over the threads.
#include "dispatch.h"
#include "guided_ddim.h"
#include "parallel.h"

namespace rewardprop::cpu {

namespace {

const GuidedDDIMLoops& loops() { return REWARDPROP_SELECT(guided_ddim_loops); }

template <typename Step>
void share_out(void (*loop)(const Step&, std::int64_t, std::int64_t), const Step& step,
               std::int64_t count) {
    parallel_for(count, [&](std::int64_t begin, std::int64_t end) { loop(step, begin, end); });
}

}  // namespace

void run(const GuidedDDIM<float>& step, std::int64_t count) {
    share_out(loops().forward_f32, step, count);
}
void run(const GuidedDDIM<math::BFloat16>& step, std::int64_t count) {
    share_out(loops().forward_bf16, step, count);
}
void run(const GuidedDDIMBackward<float>& step, std::int64_t count) {
    share_out(loops().backward_f32, step, count);
}
void run(const GuidedDDIMBackward<math::BFloat16>& step, std::int64_t count) {
    share_out(loops().backward_bf16, step, count);
}

}  // namespace rewardprop::cpu
