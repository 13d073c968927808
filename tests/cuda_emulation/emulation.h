// As much of CUDA's kernel language as csrc/cuda uses, for a C++ compiler: included before each of its files (-include), it
// makes them run on the host. The threads of a kernel that lets them exchange numbers are fibers, each of which runs until it
// has to wait for others; those of any other kernel run one after the other.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __global__
#define __launch_bounds__(...)

struct Index {
  std::uint32_t x;
};
inline Index blockIdx;
inline Index threadIdx;

namespace kl_ext::emulation {

constexpr std::uint32_t kWarp = 32;
constexpr std::size_t kStackBytes = 64 * 1024;

// The grid of each launch, and how many blocks of each to run, from its end.
inline std::vector<std::uint32_t> launched;
inline std::uint32_t last_blocks;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// A block whose threads exchange numbers. A thread waits at a place, in the source and in its own count of waits; all threads
// of its warp (a shuffle) or of the block (a barrier) must come to the same one.
class Block {
 public:
  Block(std::uint32_t threads, const std::function<void()>& body) : body_(body), threads_(threads) {
    stacks_.reset(new char[threads * kStackBytes]);
  }

  void run() {
    current = this;
    shared_.clear();
    for (std::uint32_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.state = State::kRunning;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks_.get() + i * kStackBytes;
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, &Block::enter, 0);
    }
    for (bool any_running = true; any_running;) {
      any_running = false;
      for (std::uint32_t i = 0; i < threads_.size(); ++i) {
        if (threads_[i].state == State::kRunning) {
          threadIdx.x = i;
          swapcontext(&scheduler_, &threads_[i].context);
        }
      }
      for (std::uint32_t first = 0; first < threads_.size(); first += kWarp) {
        any_running |= release(first, kWarp, State::kShuffle);
      }
      any_running |= release(0, static_cast<std::uint32_t>(threads_.size()), State::kBarrier);
    }
    for (threadIdx.x = 0; threadIdx.x < threads_.size(); ++threadIdx.x) {
      if (threads_[threadIdx.x].state != State::kDone) {
        fail("waits for threads that do not come");
      }
    }
    current = nullptr;
  }

  void barrier() { wait(State::kBarrier, 0); }

  std::uint64_t shuffle(std::uint64_t bits, std::uint32_t from) {
    const std::uint32_t warp = threadIdx.x / kWarp * kWarp;
    threads_[threadIdx.x].bits = bits;
    wait(State::kShuffle, from);
    // The values stay where they are until every thread of the warp waits again.
    return threads_[warp + from].sent;
  }

  // Filled with NaN for every block.
  template <class T>
  T* shared(int line, std::size_t size) {
    std::vector<char>& bytes = shared_[line];
    if (bytes.empty()) {
      bytes.assign(size * sizeof(T), static_cast<char>(0xff));
    }
    return reinterpret_cast<T*>(bytes.data());
  }

  static inline Block* current = nullptr;

 private:
  enum class State { kRunning, kShuffle, kBarrier, kDone };

  struct Thread {
    ucontext_t context;
    State state;
    std::uint64_t bits; // offered in a shuffle
    std::uint64_t sent; // as it was when the warp's shuffle took place
  };

  static void enter() {
    current->body_();
    current->threads_[threadIdx.x].state = State::kDone;
  }

  void wait(State state, std::uint32_t) {
    const std::uint32_t index = threadIdx.x;
    threads_[index].state = state;
    swapcontext(&threads_[index].context, &scheduler_);
  }

  // Whether all of these threads wait for each other, and so go on.
  bool release(std::uint32_t first, std::uint32_t count, State state) {
    for (std::uint32_t i = first; i < first + count; ++i) {
      if (threads_[i].state != state) {
        return false;
      }
    }
    for (std::uint32_t i = first; i < first + count; ++i) {
      threads_[i].state = State::kRunning;
      threads_[i].sent = threads_[i].bits;
    }
    return true;
  }

  std::function<void()> body_;
  std::vector<Thread> threads_;
  std::unique_ptr<char[]> stacks_;
  std::map<int, std::vector<char>> shared_;
  ucontext_t scheduler_;
};

template <class Kernel, class... Arguments>
void launch(bool exchanging, Kernel kernel, std::uint32_t blocks, std::uint32_t threads, const Arguments&... arguments) {
  launched.push_back(blocks);
  const auto body = [&] { kernel(arguments...); };
  std::unique_ptr<Block> together = exchanging ? std::make_unique<Block>(threads, body) : nullptr;
  for (blockIdx.x = blocks > last_blocks ? blocks - last_blocks : 0; blockIdx.x < blocks; ++blockIdx.x) {
    if (exchanging) {
      together->run();
      continue;
    }
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
      body();
    }
  }
}

} // namespace kl_ext::emulation

inline void __syncthreads() { kl_ext::emulation::Block::current->barrier(); }

template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, std::uint32_t lane_mask) {
  if (mask != 0xffffffff || lane_mask >= kl_ext::emulation::kWarp) {
    kl_ext::emulation::fail("a shuffle of part of a warp");
  }
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = kl_ext::emulation::Block::current->shuffle(bits, (threadIdx.x ^ lane_mask) % kl_ext::emulation::kWarp);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

#define KL_EXT_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), kl_ext::emulation::launch(false, kernel, blocks, threads, __VA_ARGS__))
#define KL_EXT_LAUNCH_EXCHANGING(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), kl_ext::emulation::launch(true, kernel, blocks, threads, __VA_ARGS__))
#define KL_EXT_UNROLL
#define KL_EXT_DEVICE inline
#define KL_EXT_SHARED(type, name, size) \
  type* const name = kl_ext::emulation::Block::current->template shared<type>(__LINE__, size)
