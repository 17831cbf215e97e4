// A sum over blocks, right and with the faults that sanitizers are there to find. The argument
// names the fault; "none" prints the sum of 0 ... 1999.
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/math/bf16.h"

using namespace rewardprop;
using namespace rewardprop::cuda;

namespace {

constexpr int kThreads = 64;

struct Sums {
    float of_warp[kThreads / 32];
};

enum class Fault {
    kNone,
    kNoBarrier,
    kOneResult,
    kPastTheEnd,
    kPastShared,
    kPastDynamic,
    kNotWritten,
    kUnreached,
    kUnaligned,
    kHalfWarp,
};

// One sum for each block.
template <Fault kFault>
__global__ void __launch_bounds__(kThreads) sum_kernel(const float* in, int count, float* out) {
    Sums& sums = shared_memory<Sums>();
    float* copies = dynamic_shared_memory<float>();
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    const int warp = thread / 32;
    const int i = static_cast<int>(blockIdx.x) * kThreads + thread;
    float value = i < count + (kFault == Fault::kPastTheEnd ? 1 : 0) ? in[i] : 0.0f;
    if (kFault == Fault::kUnaligned && i + 2 < count) value += load_pack<2>(in + i).values[1];
    copies[thread + (kFault == Fault::kPastDynamic ? 1 : 0)] = value;
    if (kFault == Fault::kUnreached && warp == 1) return;
    __syncthreads();
    value = copies[thread ^ 1];
    const unsigned lanes = kFault == Fault::kHalfWarp ? 0xFFFFu : 0xFFFFFFFFu;
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(lanes, value, step);
    const int place = kFault == Fault::kPastShared ? warp + 1 : warp;
    if (lane == 0 && !(kFault == Fault::kNotWritten && warp == 1)) sums.of_warp[place] = value;
    if (kFault != Fault::kNoBarrier) __syncthreads();
    if (thread == 0) {
        float sum = 0.0f;
        for (float part : sums.of_warp) sum += part;
        out[kFault == Fault::kOneResult ? 0 : blockIdx.x] = sum;
    }
}

template <Fault kFault>
int run() {
    std::vector<float> in(2000);
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
    std::vector<float> out((in.size() + kThreads - 1) / kThreads);
    launch("sum", sum_kernel<kFault>, dim3(static_cast<unsigned>(out.size())), dim3(kThreads),
           kThreads * sizeof(float), Stream{0, 0}, in.data(), static_cast<int>(in.size()),
           out.data());
    double sum = 0.0;
    for (float part : out) sum += part;
    std::printf("%.0f\n", sum);
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    const std::string fault = count == 2 ? arguments[1] : "";
    if (fault == "none") return run<Fault::kNone>();
    if (fault == "no_barrier") return run<Fault::kNoBarrier>();
    if (fault == "one_result") return run<Fault::kOneResult>();
    if (fault == "past_the_end") return run<Fault::kPastTheEnd>();
    if (fault == "past_shared") return run<Fault::kPastShared>();
    if (fault == "past_dynamic") return run<Fault::kPastDynamic>();
    if (fault == "not_written") return run<Fault::kNotWritten>();
    if (fault == "unreached") return run<Fault::kUnreached>();
    if (fault == "unaligned") return run<Fault::kUnaligned>();
    if (fault == "half_warp") return run<Fault::kHalfWarp>();
    return 2;
}
