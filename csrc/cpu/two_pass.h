// Work in two passes over memory, where the second needs what the first found out about a whole
// unit: an image, a group of channels. On the OpenMP pool that torch uses.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace rewardprop::cpu {

struct TwoPasses {
    std::int64_t units;
    std::int64_t chunks;     // of each unit; what a thread works on at a time
    std::int64_t unit_size;  // elements, of all tensors read
};

// Calls first(unit, chunk) for all chunks of a unit, then between(unit), then second(unit, chunk).
//
// A few units are in work at a time, and each thread walks its chunks backwards the second time: it
// begins with what its cache still holds. None of the three may throw.
template <typename First, typename Between, typename Second>
void two_passes(const TwoPasses& work, const First& first, const Between& between,
                const Second& second) {
    // Elements for each thread: below the one, waking a thread costs more than it saves; the other
    // fills half a second-level cache of 1 MB.
    constexpr std::int64_t kGrain = 32768, kWave = 131072;
    const std::int64_t size = std::max<std::int64_t>(work.unit_size, 1);
    const std::int64_t most =
        std::max<std::int64_t>(std::min(size * work.units / kGrain, work.units * work.chunks), 1);
    const std::int64_t threads = std::min<std::int64_t>(max_threads(), most);
    const std::int64_t wave =
        std::min(std::max<std::int64_t>(threads * kWave / size, 1), work.units);

    const auto walk = [&](std::int64_t me, std::int64_t team, const auto& wait) {
        for (std::int64_t begin = 0; begin < work.units; begin += wave) {
            const std::int64_t end = std::min(begin + wave, work.units);
            const std::int64_t tasks = (end - begin) * work.chunks;
            const std::int64_t from = tasks * me / team, to = tasks * (me + 1) / team;
            for (std::int64_t t = from; t < to; ++t)
                first(begin + t / work.chunks, t % work.chunks);
            wait();
            for (std::int64_t unit = begin + me; unit < end; unit += team) between(unit);
            wait();
            for (std::int64_t t = to; t-- > from;) second(begin + t / work.chunks, t % work.chunks);
        }
    };
    if (threads == 1) return walk(0, 1, [] {});
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads))
    walk(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
#endif
}

}  // namespace rewardprop::cpu
