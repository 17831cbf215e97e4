#include "geglu.cuh"
#include "launch.cuh"

namespace rewardprop::cuda {

namespace {

template <typename Op>
void launch_packs(const char* name, void (*kernel)(Op), int pack, const Op& op, Stream stream) {
    const std::int64_t count = op.rows * op.width;
    if (count == 0) return;
    launch(name, kernel, dim3(static_cast<unsigned>(elementwise_blocks(count / pack))),
           dim3(kElementwiseThreads), 0, stream, op);
}

}  // namespace

template <typename T>
void run(const Geglu<T>& op, Stream stream) {
    if (op.width % kPack<T> == 0 && aligned(op.x, 16) && aligned(op.out, 16))
        return launch_packs("geglu", geglu_kernel<T, kPack<T>>, kPack<T>, op, stream);
    launch_packs("geglu", geglu_kernel<T, 1>, 1, op, stream);
}

template <typename T>
void run(const GegluBackward<T>& op, Stream stream) {
    if (op.width % kPack<T> == 0 && aligned(op.grad, 16) && aligned(op.x, 16) &&
        aligned(op.grad_x, 16))
        return launch_packs("geglu_backward", geglu_backward_kernel<T, kPack<T>>, kPack<T>, op,
                            stream);
    launch_packs("geglu_backward", geglu_backward_kernel<T, 1>, 1, op, stream);
}

template void run(const Geglu<float>&, Stream);
template void run(const Geglu<math::BFloat16>&, Stream);
template void run(const Geglu<math::Half>&, Stream);
template void run(const GegluBackward<float>&, Stream);
template void run(const GegluBackward<math::BFloat16>&, Stream);
template void run(const GegluBackward<math::Half>&, Stream);

}  // namespace rewardprop::cuda
