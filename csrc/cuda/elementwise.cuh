// The elementwise kernels, and which of them an iteration takes. F: math/formulas.h; Access: access.cuh.
#pragma once

#include <utility>

#include "../math/gaussian.h"
#include "access.cuh"
#include "launch.cuh"

namespace kl_ext::cuda {

// The blocks per multiprocessor, for __launch_bounds__: 4 leave a thread 64 registers; 3 and 2 leave 80 and 128, for the
// kernels that hold most numbers and would otherwise spill to local memory. A wide range needs more registers. Without any
// bound the compiler sinks loads below the arithmetic.
constexpr int blocks_per_processor(math::Range range, int numbers) {
  const int weight = range == math::Range::kWide ? 2 * numbers : numbers;
  const int blocks = weight > 128 ? 2 : weight > 64 ? 3 : 4; // of 256 threads
  return (KL_EXT_BLOCKS_PER_PROCESSOR > 0 ? KL_EXT_BLOCKS_PER_PROCESSOR : blocks) * 256 / KL_EXT_ELEMENTWISE_THREADS;
}

// A thread loads so many vectors (where strided, times Access::kItems numbers) before it computes.
constexpr int kVectorsPerThread = KL_EXT_ELEMENTWISE_VECTORS;

// A thread's view of the operands, for each vector.
template <class Thread>
struct Views {
  Thread of[kVectorsPerThread];
};

template <class Thread, class Plan>
KL_EXT_INLINE Views<Thread> views_of(const Plan& plan) {
  return [&]<int... vectors>(std::integer_sequence<int, vectors...>) {
    return Views<Thread>{{Thread(plan, blockIdx.x * kVectorsPerThread + vectors, threadIdx.x)...}};
  }(std::make_integer_sequence<int, kVectorsPerThread>());
}

template <class F, math::Range range, class T, class Input, class Output, class Access>
__global__ void __launch_bounds__(kElementwiseThreads, blocks_per_processor(range, (F::kInputs + 1) * Access::kItems))
    forward(const typename Access::template Plan<F::kInputs + 1> plan, const math::Settings<T> settings) {
  constexpr int kInputs = F::kInputs;
  using Thread = typename Access::template Thread<kInputs + 1>;
  const Views<Thread> views = views_of<Thread>(plan);
  if (views.of[0].is_idle()) { // and so for all vectors
    return;
  }
  typename Access::template Loaded<Input> inputs[kVectorsPerThread][kInputs];
  KL_EXT_UNROLL
  for (int vector = 0; vector < kVectorsPerThread; ++vector) {
    if (!views.of[vector].is_idle()) {
      views.of[vector].load(1, inputs[vector]);
    }
  }
  KL_EXT_UNROLL
  for (int vector = 0; vector < kVectorsPerThread; ++vector) {
    const Thread& thread = views.of[vector];
    if (thread.is_idle()) {
      return;
    }
    T results[1][Access::kItems];
    KL_EXT_UNROLL
    for (int item = 0; item < Access::kItems; ++item) {
      T values[kInputs];
      for (int i = 0; i < kInputs; ++i) {
        values[i] = thread.template get<T>(inputs[vector][i], 1 + i, item);
      }
      results[0][item] = F::result(F::template forward<range>(values, settings), settings);
    }
    thread.template store<Output>(0, results);
  }
}

template <class F>
constexpr int kBackwardOperands = F::kGradients + 1 + F::kInputs;

// Computes every gradient and writes those that are wanted.
template <class F, math::Range range, class T, class Input, class Output, class Access>
__global__ void __launch_bounds__(kElementwiseThreads, blocks_per_processor(range, kBackwardOperands<F>* Access::kItems))
    backward(const typename Access::template Plan<kBackwardOperands<F>> plan, const math::Settings<T> settings) {
  constexpr int kInputs = F::kInputs;
  constexpr int kGradients = F::kGradients;
  using Thread = typename Access::template Thread<kBackwardOperands<F>>;
  const Views<Thread> views = views_of<Thread>(plan);
  if (views.of[0].is_idle()) { // and so for all vectors
    return;
  }
  typename Access::template Loaded<Output> grad_output[kVectorsPerThread][1];
  typename Access::template Loaded<Input> inputs[kVectorsPerThread][kInputs];
  KL_EXT_UNROLL
  for (int vector = 0; vector < kVectorsPerThread; ++vector) {
    if (!views.of[vector].is_idle()) {
      views.of[vector].load(kGradients, grad_output[vector], inputs[vector]);
    }
  }
  KL_EXT_UNROLL
  for (int vector = 0; vector < kVectorsPerThread; ++vector) {
    const Thread& thread = views.of[vector];
    if (thread.is_idle()) {
      return;
    }
    T results[kGradients][Access::kItems];
    KL_EXT_UNROLL
    for (int item = 0; item < Access::kItems; ++item) {
      T values[kInputs];
      T gradients[kGradients];
      for (int i = 0; i < kInputs; ++i) {
        values[i] = thread.template get<T>(inputs[vector][i], kGradients + 1 + i, item);
      }
      const T grad = thread.template get<T>(grad_output[vector][0], kGradients, item);
      F::template backward<range>(grad, values, settings, gradients);
      for (int i = 0; i < kGradients; ++i) {
        results[i][item] = gradients[i];
      }
    }
    thread.template store<Input>(0, results);
  }
}

// What the choice of a kernel needs to know of forward and backward.
template <class Of>
struct Forward {
  using F = Of;
  using Computed = F; // the formula that a thread computes
  static constexpr int kOperands = F::kInputs + 1;
  static constexpr int kOutputs = 1;
  static constexpr bool kIsBackward = false;
  static constexpr bool kSharesQ = false;
  static constexpr int kOutput = 0; // the operand with the result's dtype; all others have the inputs'

  template <math::Range range, class T, class Input, class Output, class Access>
  static constexpr auto kKernel = forward<F, range, T, Input, Output, Access>;
};

template <class Of>
struct Backward {
  using F = Of;
  using Computed = F;
  static constexpr int kOperands = kBackwardOperands<F>;
  static constexpr int kOutputs = F::kGradients;
  static constexpr bool kIsBackward = true;
  static constexpr bool kSharesQ = false;
  static constexpr int kOutput = F::kGradients; // grad_output

  template <math::Range range, class T, class Input, class Output, class Access>
  static constexpr auto kKernel = backward<F, range, T, Input, Output, Access>;
};

template <class S>
constexpr Storage kStorageOf = kFloat64;
template <>
inline constexpr Storage kStorageOf<float> = kFloat32;
template <>
inline constexpr Storage kStorageOf<math::BFloat16> = kBFloat16;
template <>
inline constexpr Storage kStorageOf<math::Half> = kFloat16;

template <class T>
math::Settings<T> to_settings(const Settings& settings) {
  return {static_cast<T>(settings.low), static_cast<T>(settings.high), static_cast<T>(settings.scale),
          static_cast<T>(settings.offset)};
}

constexpr std::uint32_t blocks_for(std::uint32_t vectors) {
  constexpr std::uint32_t kOfBlock = kElementwiseThreads * kVectorsPerThread;
  return (vectors + kOfBlock - 1) / kOfBlock;
}

// Whether the range is the usual one for the formula.
template <class F, math::Range range>
constexpr bool kIsUsual = range == math::Range::kNarrow || !F::kRanges;

// Launches a vector kernel, if the operands' dtypes and layouts allow it.
template <class Direction, math::Range range, class T, class Input, class Output>
bool run_vectors(const Iteration& iteration, const Settings& settings, CUstream_st* stream) {
  constexpr int kItems = kVectorBytes / (sizeof(Input) < sizeof(Output) ? sizeof(Input) : sizeof(Output));
  for (int i = 0; i < Direction::kOperands; ++i) {
    const Operand& operand = iteration.operand[i];
    const Storage dtype = i == Direction::kOutput ? kStorageOf<Output> : kStorageOf<Input>;
    if (operand.data != nullptr && operand.dtype != dtype) {
      return false;
    }
  }
  if (!fits_vectors(iteration, kItems, Direction::kOutputs)) {
    return false;
  }
  const auto fits = [](const Iteration& piece) { return fits_vector_indices(piece, kItems); };
  for_each_piece(iteration, kMaxVectorDims, fits, [&](const Iteration& piece) {
    const auto plan = plan_vectors<Direction::kOperands>(piece, kItems);
    const std::uint32_t blocks = blocks_for(plan.vectors + (plan.tail > 0 ? 1 : 0));
    // A wide clamp is rare: it has no kernels of its own for operands in rows.
    if constexpr (kIsUsual<typename Direction::F, range>) {
      if (is_in_rows(piece)) {
        constexpr auto kernel = Direction::template kKernel<range, T, Input, Output, Vectors<kItems, true>>;
        KL_EXT_LAUNCH(kernel, blocks, kElementwiseThreads, stream, plan, to_settings<T>(settings));
        return;
      }
    }
    constexpr auto kernel = Direction::template kKernel<range, T, Input, Output, Vectors<kItems, false>>;
    KL_EXT_LAUNCH(kernel, blocks, kElementwiseThreads, stream, plan, to_settings<T>(settings));
  });
  return true;
}

template <class Direction, math::Range range, class T>
void run_strided(const Iteration& iteration, const Settings& settings, CUstream_st* stream) {
  for_each_piece(iteration, kMaxStridedDims, fits_strided_indices, [&](const Iteration& piece) {
    const auto plan = plan_strides<Direction::kOperands>(piece);
    using Access = Strided<T, Direction::F::kIsWeighted>;
    constexpr auto kernel = Direction::template kKernel<range, T, void, void, Access>;
    const std::uint32_t threads = (plan.numel + Access::kItems - 1) / Access::kItems;
    KL_EXT_LAUNCH(kernel, blocks_for(threads), kElementwiseThreads, stream, plan, to_settings<T>(settings));
  });
}

template <class Direction, math::Range range, class T>
void run_range(const Iteration& iteration, const Settings& settings, CUstream_st* stream) {
  bool done = false;
  // Weights have their own dtypes, and are mostly broadcast along other dimensions than the inputs.
  if constexpr (!Direction::F::kIsWeighted) {
    done = run_vectors<Direction, range, T, T, T>(iteration, settings, stream);
  }
  if constexpr (!Direction::F::kIsWeighted && sizeof(T) == sizeof(float)) {
    done = done || run_vectors<Direction, range, T, math::BFloat16, math::BFloat16>(iteration, settings, stream);
    done = done || run_vectors<Direction, range, T, math::Half, math::Half>(iteration, settings, stream);
    // For autocast.
    done = done || run_vectors<Direction, range, T, math::BFloat16, float>(iteration, settings, stream);
    done = done || run_vectors<Direction, range, T, math::Half, float>(iteration, settings, stream);
  }
  if (!done) {
    run_strided<Direction, range, T>(iteration, settings, stream);
  }
}

// Calls run<range>() with the range that the clamp needs.
template <class F, class T, class Run>
void with_range(const Settings& settings, const Run& run) {
  if constexpr (F::kRanges) {
    if (settings.low >= -math::kNarrowBound<T> && settings.high <= math::kNarrowBound<T>) {
      run.template operator()<math::Range::kNarrow>();
      return;
    }
  }
  run.template operator()<math::Range::kWide>();
}

template <class Direction, class T>
void run_arithmetic(const Iteration& iteration, const Settings& settings, CUstream_st* stream) {
  with_range<typename Direction::F, T>(
      settings, [&]<math::Range range>() { run_range<Direction, range, T>(iteration, settings, stream); });
}

template <class Direction>
void run(const Iteration& iteration, const Settings& settings, CUstream_st* stream) {
  if (is_double(iteration)) {
    run_arithmetic<Direction, double>(iteration, settings, stream);
  } else {
    run_arithmetic<Direction, float>(iteration, settings, stream);
  }
}

namespace kernels {

template <class F>
void forward(const Iteration& iteration, const Settings& settings, CUstream_st* stream) {
  run<Forward<F>>(iteration, settings, stream);
}

template <class F>
void backward(const Iteration& iteration, const Settings& settings, CUstream_st* stream) {
  run<Backward<F>>(iteration, settings, stream);
}

} // namespace kernels

} // namespace kl_ext::cuda
