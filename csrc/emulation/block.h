// A block of CUDA threads on the host: who waits for whom, and the memory they share.
//
// Two ways to run one, chosen when compiling. By default the threads are fibers of one host thread:
// fast, the same every time, and a barrier that some threads never reach is reported. With
// REWARDPROP_EMULATION_THREADS they are host threads, so that ThreadSanitizer sees their races.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if defined(REWARDPROP_EMULATION_THREADS)
#include <condition_variable>
#else
#include "fibers.h"
#endif

// What a __global__ function sees by these names is defined by language.h.
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    std::int64_t count() const { return static_cast<std::int64_t>(x) * y * z; }
};

namespace rewardprop::emulation {

constexpr int kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated CUDA: %s\n", what);
    std::abort();
}

// All `expected` threads wait until the last one has come. What they wrote before is seen after.
class Barrier {
  public:
    explicit Barrier(int expected) : expected_(expected) {}

#if defined(REWARDPROP_EMULATION_THREADS)
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const unsigned generation = generation_;
        if (++arrived_ == expected_) {
            arrived_ = 0;
            ++generation_;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return generation_ != generation; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable all_;
#else
    void wait() {
        const unsigned generation = generation_;
        Fibers::made_progress();
        if (++arrived_ == expected_) {
            arrived_ = 0;
            ++generation_;
        } else {
            while (generation_ == generation) Fibers::yield();
        }
    }

  private:
#endif
    int expected_;
    int arrived_ = 0;
    unsigned generation_ = 0;
};

// 32 threads, and the words they pass to each other.
struct Warp {
    Barrier barrier{kWarp};
    std::array<std::uint64_t, kWarp> words{};
};

// Memory of exactly the size asked for, so that AddressSanitizer sees where it ends. It begins as
// NaN, whatever the type: a kernel that reads before it writes shows.
class Memory {
  public:
    explicit Memory(std::size_t size) : bytes_(new unsigned char[size]), size_(size) { poison(); }
    void poison() { std::memset(bytes_.get(), 0xFF, size_); }
    void* get() const { return bytes_.get(); }

  private:
    std::unique_ptr<unsigned char[]> bytes_;
    std::size_t size_;
};

class Block {
  public:
    Block(dim3 grid, dim3 size, std::size_t dynamic_bytes)
        : grid(grid), size(size), barrier(static_cast<int>(size.count())), dynamic_(dynamic_bytes) {
        for (std::int64_t i = 0; i < size.count(); i += kWarp) {
            warps.push_back(std::make_unique<Warp>());
        }
    }

    // The next block in this one's place: its shared memory holds nothing of the last.
    void begin(std::int64_t linear) {
        index.x = static_cast<unsigned>(linear % grid.x);
        index.y = static_cast<unsigned>(linear / grid.x % grid.y);
        index.z = static_cast<unsigned>(linear / grid.x / grid.y);
        dynamic_.poison();
        for (Slot& slot : slots_) {
            if (slot.memory) slot.memory->poison();
        }
    }

    void* dynamic() const { return dynamic_.get(); }

    // The block's one object for this key. Threads that find it are not ordered with each other:
    // a lock here would hide their races from ThreadSanitizer.
    void* shared(const void* key, std::size_t size) {
        for (Slot& slot : slots_) {
            if (slot.key.load(std::memory_order_acquire) == key) return slot.memory->get();
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        for (Slot& slot : slots_) {
            if (slot.key.load(std::memory_order_relaxed) == key) return slot.memory->get();
            if (!slot.memory) {
                slot.memory = std::make_unique<Memory>(size);
                slot.key.store(key, std::memory_order_release);
                return slot.memory->get();
            }
        }
        fail("more than 8 objects of shared memory");
    }

    dim3 grid, size, index;
    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;

  private:
    struct Slot {
        std::atomic<const void*> key{nullptr};
        std::unique_ptr<Memory> memory;
    };
    Memory dynamic_;
    std::array<Slot, 8> slots_;
    std::mutex mutex_;
};

// A CUDA thread: what its built-in variables say.
struct Thread {
    Block* block;
    dim3 index;
    int linear;

    Warp& warp() const { return *block->warps[static_cast<std::size_t>(linear / kWarp)]; }
    int lane() const { return linear % kWarp; }
};

// The thread that is running here and now.
inline thread_local Thread* current = nullptr;

inline Thread make_thread(Block& block, int linear) {
    const unsigned i = static_cast<unsigned>(linear);
    const dim3 size = block.size;
    return {&block, {i % size.x, i / size.x % size.y, i / size.x / size.y}, linear};
}

}  // namespace rewardprop::emulation
