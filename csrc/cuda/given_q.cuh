// Sums in which many p share a q, as against a prior of shape [D]: what depends on q alone is computed once per column. A thread
// does that for itself in sums by columns, where it keeps its columns, and a block in sums by rows, where all rows have one q.
#pragma once

#include <type_traits>

#include "elementwise.cuh"
#include "sum_access.cuh"

namespace kl_ext::cuda {

// A direction of a pair whose terms are computed given q.
template <class Direction>
struct GivenQ : Direction {
  using Computed = typename Direction::F::GivenQ;
  static constexpr bool kSharesQ = true;
};

template <class F>
constexpr bool kMayShareQ = !std::is_void_v<typename F::GivenQ> && !F::kIsWeighted;

// The inputs that are loaded for each term: all, or those of p.
template <class Direction>
constexpr int kOwnInputs = Direction::kSharesQ ? 2 : Direction::F::kInputs;

// The q of a thread's numbers, as the last inputs of what is computed given q. Unused in other directions.
template <class Direction, class T, class Access>
struct Q {
  static constexpr int kItems = Direction::kSharesQ ? Access::kItems : 1;
  T inputs[3][kItems];

  template <class Input, class Thread>
  KL_EXT_INLINE void load(const Thread& thread, math::Settings<T> settings) {
    constexpr int kFirst = Direction::kOperands - 2;
    typename Access::template Loaded<Input> loaded[2];
    thread.load(kFirst, loaded);
    for (int item = 0; item < kItems; ++item) {
      for (int i = 0; i < 2; ++i) {
        inputs[i][item] = thread.template get<T>(loaded[i], kFirst + i, item);
      }
      inputs[2][item] = Direction::Computed::template prepared<!Direction::kIsBackward>(inputs[1][item], settings);
    }
  }

  // of(thread) is the q of a thread's terms, as in SharedQ: here they all have this one.
  template <class Thread>
  KL_EXT_INLINE const Q& of(const Thread&) const {
    return *this;
  }
};

// The most columns: their q takes 12 KiB of shared memory.
template <class T>
constexpr std::int64_t kMostColumns = 4096 / sizeof(T);

// The q of every column of the rows, in shared memory of 3 * kMostColumns<T> numbers, which all threads of the block fill.
template <class Direction, class T, class Access, class Shared>
class SharedQ {
 public:
  KL_EXT_INLINE explicit SharedQ(Shared shared) : shared_(shared) {}

  template <class Input, class Plan>
  KL_EXT_DEVICE void fill(const Plan& plan, std::uint32_t threads, math::Settings<T> settings) const {
    for (std::uint32_t vector = threadIdx.x; vector < plan.vectors.divisor; vector += threads) {
      Q<Direction, T, Access> q;
      using Thread = typename Access::template Thread<Direction::kOperands>;
      q.template load<Input>(Thread(plan, vector, 0, 0), settings);
      for (int i = 0; i < 3; ++i) {
        for (int item = 0; item < Access::kItems; ++item) {
          shared_[place(i, item, vector)] = q.inputs[i][item];
        }
      }
    }
    __syncthreads();
  }

  template <class Thread>
  KL_EXT_INLINE Q<Direction, T, Access> of(const Thread& thread) const {
    Q<Direction, T, Access> q;
    for (int i = 0; i < 3; ++i) {
      for (int item = 0; item < Access::kItems; ++item) {
        q.inputs[i][item] = shared_[place(i, item, thread.vector_in_row())];
      }
    }
    return q;
  }

 private:
  // In parts of 16 bytes: neighbouring threads read neighbouring parts, also for half types, where a thread has two.
  static KL_EXT_INLINE std::uint32_t place(int i, int item, std::uint32_t vector) {
    constexpr int kBeside = kVectorBytes / sizeof(T);
    constexpr int kParts = Access::kItems / kBeside;
    constexpr std::uint32_t kVectors = kMostColumns<T> / Access::kItems;
    return ((i * kParts + item / kBeside) * kVectors + vector) * kBeside + item % kBeside;
  }

  Shared shared_;
};

} // namespace kl_ext::cuda
