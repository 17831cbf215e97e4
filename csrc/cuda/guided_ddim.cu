#include "guided_ddim.cuh"
#include "launch.cuh"

namespace rewardprop::cuda {

namespace {

constexpr int kWide = kPack<float>;  // of the latents; the model's output moves as many elements

template <typename Step>
void launch_elementwise(const char* name, void (*wide)(Step), void (*single)(Step), bool is_wide,
                        const Step& step, Stream stream) {
    if (step.count == 0) return;
    const std::int64_t blocks = elementwise_blocks(is_wide ? step.count / kWide : step.count);
    launch(name, is_wide ? wide : single, dim3(static_cast<unsigned>(blocks)),
           dim3(kElementwiseThreads), 0, stream, step);
}

}  // namespace

template <typename Model>
void run(const GuidedDDIM<Model>& step, Stream stream) {
    const bool wide = step.count % kWide == 0 && aligned(step.uncond, sizeof(Model) * kWide) &&
                      aligned(step.latents, 16) && aligned(step.noise, 16) && aligned(step.out, 16);
    launch_elementwise<GuidedDDIM<Model>>("guided_ddim_step", guided_ddim_kernel<Model, kWide>,
                                          guided_ddim_kernel<Model, 1>, wide, step, stream);
}

template <typename Model>
void run(const GuidedDDIMBackward<Model>& step, Stream stream) {
    const bool wide = step.count % kWide == 0 && aligned(step.grad, 16) &&
                      aligned(step.grad_uncond, sizeof(Model) * kWide);
    launch_elementwise<GuidedDDIMBackward<Model>>(
        "guided_ddim_step_backward", guided_ddim_backward_kernel<Model, kWide>,
        guided_ddim_backward_kernel<Model, 1>, wide, step, stream);
}

template void run(const GuidedDDIM<float>&, Stream);
template void run(const GuidedDDIM<math::BFloat16>&, Stream);
template void run(const GuidedDDIM<math::Half>&, Stream);
template void run(const GuidedDDIMBackward<float>&, Stream);
template void run(const GuidedDDIMBackward<math::BFloat16>&, Stream);
template void run(const GuidedDDIMBackward<math::Half>&, Stream);

}  // namespace rewardprop::cuda
