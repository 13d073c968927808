// What a thread of a summing kernel does with its terms: loads several steps of them, computes, and adds to its lanes.
#pragma once

#include "given_q.cuh"

namespace kl_ext::cuda {

// How many steps issue their loads before any of their numbers is used: a chunk takes at most 16 steps, and a short sum mostly
// waits for memory.
template <class Direction, class Access>
constexpr int kStepsAtOnce =
    Direction::kIsBackward                       ? 1
    : Access::kNeighbours && Access::kItems <= 4 ? 8 / kOwnInputs<Direction>
                                                 : (4 / kOwnInputs<Direction> > 0 ? 4 / kOwnInputs<Direction> : 1);

// A thread's numbers in one step, and their computation. Every gradient is computed.
template <class Direction, math::Range range, class T, class Input, class Output, class Access>
struct Step {
  using F = typename Direction::F;
  using Computed = typename Direction::Computed;
  using Thread = typename Access::template Thread<Direction::kOperands>;
  static constexpr int kFirstInput = Direction::kOperands - F::kInputs;
  static constexpr int kOwn = kOwnInputs<Direction>;
  static constexpr int kOwnGradients = Direction::kSharesQ ? 2 : F::kGradients; // gradients of those inputs

  typename Access::template Loaded<Input> inputs[kOwn];
  typename Access::template Loaded<Output> grad_output[1]; // for a backward

  KL_EXT_INLINE void load(const Thread& thread) {
    if constexpr (!Direction::kIsBackward) {
      thread.load(kFirstInput, inputs);
    } else if constexpr (Access::kNeighbours) {
      thread.load(Direction::kOutput, grad_output, inputs);
    } else { // with grad_output first, a wide float64 would take more registers than there are
      thread.load(kFirstInput, inputs);
      thread.load(Direction::kOutput, grad_output);
    }
  }

  template <class SomeQ>
  KL_EXT_INLINE void compute(const Thread& thread, math::Settings<T> settings, const SomeQ& some_q,
                             T (&results)[Direction::kOutputs][Access::kItems]) const {
    const Q<Direction, T, Access>& q = some_q.of(thread);
    T own[Direction::kIsBackward ? kOwnGradients : 1][Access::kItems];
    KL_EXT_UNROLL
    for (int item = 0; item < Access::kItems; ++item) {
      T values[Computed::kInputs];
      for (int i = 0; i < kOwn; ++i) {
        values[i] = thread.template get<T>(inputs[i], kFirstInput + i, item);
      }
      if constexpr (Direction::kSharesQ) {
        for (int i = 0; i < 3; ++i) {
          values[2 + i] = q.inputs[i][item];
        }
      }
      if constexpr (!Direction::kIsBackward) {
        results[0][item] = Computed::template forward<range>(values, settings);
      } else {
        T gradients[F::kGradients];
        const T grad = thread.template get<T>(grad_output[0], Direction::kOutput, item);
        Computed::template backward<range>(grad, values, settings, gradients);
        for (int i = 0; i < F::kGradients; ++i) {
          results[i][item] = gradients[i];
        }
        for (int i = 0; i < kOwnGradients; ++i) {
          own[i][item] = gradients[i];
        }
      }
    }
    if constexpr (Direction::kIsBackward) {
      thread.template store<Input>(0, own);
    }
  }
};

// The first output that may be summed.
template <class Direction>
constexpr int kFirstSummed = Direction::kIsBackward && Direction::kSharesQ ? 2 : 0;

// Adds a thread's terms to its lanes: terms first, first + stride, ... below count. at(term) gives access to a term, and
// valid(term) the number of its items that exist.
template <class Direction, math::Range range, class T, class Input, class Output, class Access, class At, class Valid,
          class SomeQ>
KL_EXT_INLINE void add_terms(std::int32_t first, std::int32_t stride, std::int32_t count, math::Settings<T> settings,
                             const At& at, const Valid& valid, const SomeQ& q,
                             T (&lanes)[Direction::kOutputs][Access::kItems]) {
  constexpr int kSteps = kStepsAtOnce<Direction, Access>;
  for (; first < count; first += kSteps * stride) {
    Step<Direction, range, T, Input, Output, Access> steps[kSteps];
    KL_EXT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const std::int32_t term = first + step * stride;
      if (term < count) {
        steps[step].load(at(term));
      }
    }
    KL_EXT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const std::int32_t term = first + step * stride;
      if (term < count) {
        T terms[Direction::kOutputs][Access::kItems];
        steps[step].compute(at(term), settings, q, terms);
        for (int output = kFirstSummed<Direction>; output < Direction::kOutputs; ++output) {
          for (int item = 0; item < Access::kItems; ++item) {
            const T sum = lanes[output][item] + terms[output][item];
            lanes[output][item] = Access::kIsWhole || item < valid(term) ? sum : lanes[output][item];
          }
        }
      }
    }
  }
}

// The threads that share a lane, `distance` apart in the block. They compute consecutive terms of it at the same time and leave
// them in shared memory, where the first of them, the owner, adds them in their order.
struct Sharers {
  std::uint32_t count;
  std::uint32_t own; // which of them this thread is
  std::uint32_t distance;
};

// Like add_terms, for threads that share lanes. All threads of the block must call it together. most: the terms of a chunk,
// unless it is the last and shorter. slots: see SumShape. exchange: room for kItems numbers for each thread.
template <class Direction, math::Range range, class T, class Input, class Output, class Access, class At, class Valid,
          class SomeQ, class Exchange>
KL_EXT_DEVICE void add_shared_terms(std::int32_t first, std::int32_t stride, std::int32_t count, std::int32_t most,
                                    math::Settings<T> settings, const At& at, const Valid& valid, const SomeQ& q,
                                    const Sharers& sharers, const std::int32_t (&slots)[kMaxOutputs], Exchange exchange,
                                    T (&lanes)[Direction::kOutputs][Access::kItems]) {
  constexpr int kSteps = kStepsAtOnce<Direction, Access>;
  for (std::int32_t start = 0; start < most; start += kSteps * stride) {
    Step<Direction, range, T, Input, Output, Access> steps[kSteps];
    KL_EXT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const std::int32_t term = first + start + step * stride;
      if (term < count) {
        steps[step].load(at(term));
      }
    }
    KL_EXT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      if (start + step * stride >= most) {
        break; // for all threads of the block
      }
      const std::int32_t term = first + start + step * stride;
      T terms[Direction::kOutputs][Access::kItems] = {};
      if (term < count) {
        steps[step].compute(at(term), settings, q, terms);
      }
      KL_EXT_UNROLL
      for (int output = kFirstSummed<Direction>; output < Direction::kOutputs; ++output) {
        if (slots[output] < 0) {
          continue;
        }
        __syncthreads();
        for (int item = 0; item < Access::kItems; ++item) { // a missing term is +0, which changes no lane: a lane is never -0
          const bool exists = term < count && (Access::kIsWhole || item < valid(term));
          exchange[item * kThreads + threadIdx.x] = exists ? terms[output][item] : T(0);
        }
        __syncthreads();
        if (sharers.own == 0) {
          for (std::uint32_t sharer = 0; sharer < sharers.count; ++sharer) {
            for (int item = 0; item < Access::kItems; ++item) {
              lanes[output][item] += exchange[item * kThreads + threadIdx.x + sharer * sharers.distance];
            }
          }
        }
      }
    }
  }
}

} // namespace kl_ext::cuda
