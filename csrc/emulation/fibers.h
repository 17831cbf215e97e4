// Many threads of control on one host thread: each runs until it waits, then the next one.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace rewardprop::emulation {

class Fibers {
  public:
    explicit Fibers(int count) : fibers_(static_cast<std::size_t>(count)) {
        for (Fiber& fiber : fibers_) fiber.stack.reset(new unsigned char[kStack]);
    }

    // Runs body(i) for every fiber i until all have returned. `enter(i)` is called whenever fiber i
    // is about to go on.
    void run(const std::function<void(int)>& body, const std::function<void(int)>& enter) {
        body_ = &body;
        running_ = this;
        for (std::size_t i = 0; i < fibers_.size(); ++i) prepare(static_cast<int>(i));
        std::size_t left = fibers_.size();
        while (left > 0) {
            progress_ = false;
            for (std::size_t i = 0; i < fibers_.size(); ++i) {
                if (fibers_[i].done) continue;
                enter(static_cast<int>(i));
                current_ = static_cast<int>(i);
                resume(fibers_[i]);
                if (fibers_[i].done) {
                    --left;
                    progress_ = true;
                }
            }
            if (!progress_) {
                std::fprintf(stderr,
                             "emulated CUDA: threads wait at a barrier that others never reach\n");
                std::abort();
            }
        }
    }

    // Lets the others go on; to be called by a fiber.
    static void yield() {
        Fiber& fiber = running_->fibers_[static_cast<std::size_t>(running_->current_)];
        running_->leave(fiber, false);
    }

    // A fiber has got further; if none does, all are waiting for each other.
    static void made_progress() { running_->progress_ = true; }

  private:
    static constexpr std::size_t kStack = 256 * 1024;

    struct Fiber {
        ucontext_t context;
        std::unique_ptr<unsigned char[]> stack;
        void* fake_stack = nullptr;  // AddressSanitizer's
        bool done = false;
    };

    void prepare(int index) {
        Fiber& fiber = fibers_[static_cast<std::size_t>(index)];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Fibers::entry, 0);
    }

    static void entry() {
        Fibers& self = *running_;
        self.arrived(nullptr);
        const int index = self.current_;
        (*self.body_)(index);
        Fiber& fiber = self.fibers_[static_cast<std::size_t>(index)];
        fiber.done = true;
        self.leave(fiber, true);
    }

    void resume(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStack);
#endif
        swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }

    // AddressSanitizer is told of every change of stack.
    void leave(Fiber& fiber, [[maybe_unused]] bool forever) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                       scheduler_stack_size_);
#endif
        swapcontext(&fiber.context, &scheduler_);
        arrived(fiber.fake_stack);
    }

    void arrived([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_size_);
#endif
    }

    std::vector<Fiber> fibers_;
    ucontext_t scheduler_;
    const void* scheduler_stack_ = nullptr;
    std::size_t scheduler_stack_size_ = 0;
    const std::function<void(int)>* body_ = nullptr;
    int current_ = 0;
    bool progress_ = false;
    inline static thread_local Fibers* running_ = nullptr;
};

}  // namespace rewardprop::emulation
