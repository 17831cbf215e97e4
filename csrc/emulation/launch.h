// Runs a kernel's grid on the host.
#pragma once

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "block.h"

namespace rewardprop::emulation {

// What every device since compute capability 8.0 refuses. Fewer threads than whole warps it would
// take, but our shuffles are among whole ones.
inline void check_launch(dim3 grid, dim3 block, std::size_t dynamic_bytes) {
    if (grid.count() < 1 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
        throw std::invalid_argument("emulated CUDA: no legal grid");
    if (block.count() < 1 || block.count() > 1024 || block.z > 64 || block.count() % kWarp != 0)
        throw std::invalid_argument("emulated CUDA: no legal block");
    if (dynamic_bytes > 48 * 1024)
        throw std::invalid_argument("emulated CUDA: more than 48 KB of dynamic shared memory");
}

#if defined(REWARDPROP_EMULATION_THREADS)

// Two blocks at a time, so that blocks that write where others read or write are seen as well.
inline void run_grid(dim3 grid, dim3 size, std::size_t dynamic_bytes,
                     const std::function<void()>& kernel) {
    check_launch(grid, size, dynamic_bytes);
    constexpr std::int64_t kAtOnce = 2;
    std::vector<std::unique_ptr<Block>> places;
    std::vector<std::thread> threads;
    for (std::int64_t place = 0; place < std::min(kAtOnce, grid.count()); ++place) {
        places.push_back(std::make_unique<Block>(grid, size, dynamic_bytes));
        Block* block = places.back().get();
        for (int linear = 0; linear < size.count(); ++linear) {
            threads.emplace_back([=, &kernel] {
                Thread thread = make_thread(*block, linear);
                current = &thread;
                for (std::int64_t b = place; b < grid.count(); b += kAtOnce) {
                    block->barrier.wait();
                    if (linear == 0) block->begin(b);
                    block->barrier.wait();
                    kernel();
                }
            });
        }
    }
    for (std::thread& thread : threads) thread.join();
}

#else

inline void run_grid(dim3 grid, dim3 size, std::size_t dynamic_bytes,
                     const std::function<void()>& kernel) {
    check_launch(grid, size, dynamic_bytes);
    Block block(grid, size, dynamic_bytes);
    std::vector<Thread> threads;
    for (int linear = 0; linear < size.count(); ++linear) {
        threads.push_back(make_thread(block, linear));
    }
    Fibers fibers(static_cast<int>(size.count()));
    for (std::int64_t b = 0; b < grid.count(); ++b) {
        block.begin(b);
        fibers.run([&](int) { kernel(); },
                   [&](int linear) { current = &threads[static_cast<std::size_t>(linear)]; });
    }
}

#endif

}  // namespace rewardprop::emulation
