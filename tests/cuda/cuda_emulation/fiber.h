// Fibers: functions that take turns on one thread, each with a stack of its own.
#pragma once

#include <cstddef>
#include <memory>

#include <ucontext.h>

// The address sanitizer has to be told which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

namespace kl_ext::emulation {

constexpr std::size_t kStackBytes = 128 * 1024; // of which the pages in use are real

class Fiber {
 public:
  Fiber() : stack_(new char[kStackBytes]) {}

  // function() starts when the fiber is resumed for the first time. What it threw last time must not have left it.
  void start(void (*function)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = &caller;
    sanitizer_state_ = nullptr;
    function_ = function;
    makecontext(&context_, &Fiber::enter, 0);
  }

  // Runs it until it suspends itself or returns.
  void resume() {
    current = this;
    void* state = nullptr;
    __sanitizer_start_switch_fiber(&state, stack_.get(), kStackBytes);
    swapcontext(&caller, &context_);
    __sanitizer_finish_switch_fiber(state, nullptr, nullptr);
  }

  static void suspend() {
    Fiber* const fiber = current;
    __sanitizer_start_switch_fiber(&fiber->sanitizer_state_, callers_stack, callers_stack_bytes);
    swapcontext(&fiber->context_, &caller);
    __sanitizer_finish_switch_fiber(fiber->sanitizer_state_, &callers_stack, &callers_stack_bytes);
  }

 private:
  static void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &callers_stack, &callers_stack_bytes);
    current->function_();
    __sanitizer_start_switch_fiber(nullptr, callers_stack, callers_stack_bytes);
  }

  static inline Fiber* current;
  static inline ucontext_t caller;
  static inline const void* callers_stack;
  static inline std::size_t callers_stack_bytes;

  std::unique_ptr<char[]> stack_;
  ucontext_t context_;
  void (*function_)();
  void* sanitizer_state_;
};

} // namespace kl_ext::emulation
