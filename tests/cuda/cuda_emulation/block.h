// The threads of a block, as fibers, and what they wait for: all threads of a warp (a shuffle) or of the block (a barrier) must
// come to the same place in the source, and none may have returned.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>

#include "fiber.h"
#include "shared_array.h"

namespace kl_ext::emulation {

enum class Order { kForward, kReverse, kRandom };
inline Order order = Order::kForward;
inline std::minstd_rand random_order;

// The turns that blocks take, and the threads of each from one wait to the next.
inline void arrange(std::vector<std::uint32_t>& turns, std::uint32_t first = 0) {
  std::iota(turns.begin(), turns.end(), first);
  if (order == Order::kReverse) {
    std::reverse(turns.begin(), turns.end());
  } else if (order == Order::kRandom) {
    std::shuffle(turns.begin(), turns.end(), random_order);
  }
}

inline bool operator==(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// The threads of a block of a kernel in which they exchange numbers.
class Block {
 public:
  Block(std::uint32_t threads, std::function<void()> body) : body_(std::move(body)), threads_(threads), turns_(threads) {
    fibers.resize(std::max<std::size_t>(fibers.size(), threads));
  }

  void run() {
    current = this;
    shared_.clear();
    epoch_ = 1;
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].state = State::kRunning;
      fibers[i].start(&Block::enter);
    }
    try {
      while (run_until_all_wait()) {
      }
      check_all_returned();
    } catch (const Fault&) {
      fibers.clear(); // they are somewhere in the kernel
      current = nullptr;
      throw;
    }
    current = nullptr;
  }

  void barrier(const Site& site) { wait(State::kBarrier, site); }

  std::uint64_t shuffle(std::uint64_t bits, std::uint32_t lane_mask, const Site& site) {
    Thread& thread = threads_[threadIdx.x];
    thread.bits = bits;
    thread.lane_mask = lane_mask;
    wait(State::kShuffle, site);
    // The values stay where they are until every thread of the warp waits again.
    return threads_[threadIdx.x ^ lane_mask].sent;
  }

  // The array declared at this site, by whichever thread comes there first.
  SharedArray& shared(const char* name, std::size_t size, const Site& site) {
    const auto declaration = std::make_pair(std::string(site.file_name()), site.line());
    return shared_.try_emplace(declaration, name, size, epoch_).first->second;
  }

  // The block that runs, if its threads may exchange numbers.
  static Block& of(const Site& site) {
    if (current == nullptr) {
      fail(site, "exchanges numbers, which a kernel does that KL_EXT_LAUNCH_EXCHANGING launches");
    }
    return *current;
  }

 private:
  enum class State { kRunning, kShuffle, kBarrier, kDone };

  struct Thread {
    State state;
    Site site;               // where it waits
    std::uint32_t lane_mask; // of its shuffle
    std::uint64_t bits;      // offered in a shuffle
    std::uint64_t sent;      // as it was when the warp's shuffle took place
  };

  static inline Block* current = nullptr;
  static inline std::vector<Fiber> fibers; // of all blocks, one after the other

  // No exception may leave a fiber.
  static void enter() {
    try {
      current->body_();
    } catch (const Fault& fault) {
      current->fault_ = fault;
    }
    current->threads_[threadIdx.x].state = State::kDone;
  }

  void wait(State state, const Site& site) {
    const std::uint32_t index = threadIdx.x;
    threads_[index].state = state;
    threads_[index].site = site;
    Fiber::suspend();
  }

  // Whether any thread can go on after that.
  bool run_until_all_wait() {
    arrange(turns_);
    for (const std::uint32_t i : turns_) {
      if (threads_[i].state == State::kRunning) {
        threadIdx.x = i;
        fibers[i].resume();
        if (fault_) {
          throw Fault(*fault_);
        }
      }
    }
    const auto threads = static_cast<std::uint32_t>(threads_.size());
    bool any_running = false;
    for (std::uint32_t first = 0; first < threads; first += kWarp) {
      any_running |= release(first, kWarp, State::kShuffle);
    }
    if (release(0, threads, State::kBarrier)) {
      ++epoch_;
      any_running = true;
    }
    return any_running;
  }

  // Whether all of these threads wait for each other, and so go on.
  bool release(std::uint32_t first, std::uint32_t count, State state) {
    for (std::uint32_t i = first; i < first + count; ++i) {
      if (threads_[i].state != state) {
        return false;
      }
    }
    for (std::uint32_t i = first; i < first + count; ++i) {
      const Thread& thread = threads_[i];
      const bool same_lanes = state == State::kBarrier || thread.lane_mask == threads_[first].lane_mask;
      if (!(thread.site == threads_[first].site) || !same_lanes) {
        threadIdx.x = i;
        fail(thread.site, describe(i) + (same_lanes ? "" : " with other lanes") + ", while " + describe(first));
      }
    }
    for (std::uint32_t i = first; i < first + count; ++i) {
      threads_[i].state = State::kRunning;
      threads_[i].sent = threads_[i].bits;
    }
    return true;
  }

  std::string describe(std::uint32_t i) const {
    const Thread& thread = threads_[i];
    const std::string name = "thread " + std::to_string(i);
    return thread.state == State::kDone
               ? name + " has returned"
               : name + (thread.state == State::kBarrier ? " is at a barrier at " : " shuffles at ") + to_string(thread.site);
  }

  void check_all_returned() {
    const auto returned = [](const Thread& thread) { return thread.state == State::kDone; };
    const auto waiting = std::find_if_not(threads_.begin(), threads_.end(), returned);
    if (waiting == threads_.end()) {
      return;
    }
    threadIdx.x = static_cast<std::uint32_t>(waiting - threads_.begin());
    std::uint32_t other = waiting->state == State::kShuffle ? threadIdx.x / kWarp * kWarp : 0;
    while (threads_[other].state == waiting->state) {
      ++other;
    }
    fail(waiting->site, describe(threadIdx.x) + ", while " + describe(other));
  }

  std::function<void()> body_;
  std::vector<Thread> threads_;
  std::vector<std::uint32_t> turns_;
  std::map<std::pair<std::string, std::uint32_t>, SharedArray> shared_;
  std::uint32_t epoch_;
  std::optional<Fault> fault_;
};

} // namespace kl_ext::emulation
