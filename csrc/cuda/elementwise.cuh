// The kernels of the elementwise losses, and which of them an iteration takes. Loss: math/gaussian.h; Access: access.cuh.
#pragma once

#include "../math/gaussian.h"
#include "access.cuh"
#include "launch.cuh"

namespace kl_ext::cuda {

// The blocks that are to fit a multiprocessor, for __launch_bounds__: 4 leave a thread 64 registers; 3 and 2 leave the kernels
// that hold most numbers 80 and 128, which those would else keep in local memory. A wide range takes registers of its own.
// Without this bound the compiler sinks loads below the arithmetic.
constexpr int blocks_per_processor(math::Range range, int numbers) {
  const int weight = range == math::Range::kWide ? 2 * numbers : numbers;
  return weight > 128 ? 2 : weight > 64 ? 3 : 4;
}

template <class Loss, math::Range range, class T, class Input, class Output, class Access>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(range, (Loss::kInputs + 1) * Access::kItems))
    forward(const typename Access::template Plan<Loss::kInputs + 1> plan, const math::Clamp<T> bounds) {
  constexpr int kInputs = Loss::kInputs;
  const typename Access::template Thread<kInputs + 1> thread(plan, blockIdx.x, threadIdx.x);
  if (thread.is_idle()) {
    return;
  }
  typename Access::template Loaded<Input> inputs[kInputs];
  thread.load(1, inputs);
  T results[1][Access::kItems];
  for (int item = 0; item < Access::kItems; ++item) {
    T values[kInputs];
    for (int i = 0; i < kInputs; ++i) {
      values[i] = thread.template get<T>(inputs[i], 1 + i, item);
    }
    results[0][item] = Loss::template forward<range>(values, bounds);
  }
  thread.template store<Output>(0, results);
}

// Every gradient is computed; those not wanted are not written.
template <class Loss, math::Range range, class T, class Input, class Output, class Access>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(range, (2 * Loss::kInputs + 1) * Access::kItems))
    backward(const typename Access::template Plan<2 * Loss::kInputs + 1> plan, const math::Clamp<T> bounds) {
  constexpr int kInputs = Loss::kInputs;
  const typename Access::template Thread<2 * kInputs + 1> thread(plan, blockIdx.x, threadIdx.x);
  if (thread.is_idle()) {
    return;
  }
  typename Access::template Loaded<Output> grad_output[1];
  typename Access::template Loaded<Input> inputs[kInputs];
  thread.load(kInputs, grad_output, inputs);
  T results[kInputs][Access::kItems];
  for (int item = 0; item < Access::kItems; ++item) {
    T values[kInputs];
    T gradients[kInputs];
    for (int i = 0; i < kInputs; ++i) {
      values[i] = thread.template get<T>(inputs[i], kInputs + 1 + i, item);
    }
    const T grad = thread.template get<T>(grad_output[0], kInputs, item);
    Loss::template backward<range>(grad, values, bounds, gradients);
    for (int i = 0; i < kInputs; ++i) {
      results[i][item] = gradients[i];
    }
  }
  thread.template store<Input>(0, results);
}

// What the choice of a kernel has to know of the two.
template <class L>
struct Forward {
  using Loss = L;
  static constexpr int kOperands = Loss::kInputs + 1;
  static constexpr int kOutputs = 1;
  static constexpr bool kIsBackward = false;
  static constexpr bool kSharesQ = false;
  static constexpr int kOutput = 0; // the operand with the result's dtype; all others have the inputs'

  template <math::Range range, class T, class Input, class Output, class Access>
  static constexpr auto kKernel = forward<Loss, range, T, Input, Output, Access>;
};

template <class L>
struct Backward {
  using Loss = L;
  static constexpr int kOperands = 2 * Loss::kInputs + 1;
  static constexpr int kOutputs = Loss::kInputs;
  static constexpr bool kIsBackward = true;
  static constexpr bool kSharesQ = false;
  static constexpr int kOutput = Loss::kInputs; // grad_output

  template <math::Range range, class T, class Input, class Output, class Access>
  static constexpr auto kKernel = backward<Loss, range, T, Input, Output, Access>;
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
math::Clamp<T> to_clamp(Bounds bounds) {
  return {static_cast<T>(bounds.low), static_cast<T>(bounds.high)};
}

constexpr std::uint32_t blocks_for(std::uint32_t threads) { return (threads + kThreads - 1) / kThreads; }

// Launches a vector kernel if the operands' dtypes and layouts let it.
template <class Direction, math::Range range, class T, class Input, class Output>
bool run_vectors(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
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
    // A wide clamp is rare enough to do without kernels of its own for operands in rows.
    if constexpr (range == math::Range::kNarrow) {
      if (is_in_rows(piece)) {
        constexpr auto kernel = Direction::template kKernel<range, T, Input, Output, Vectors<kItems, true>>;
        KL_EXT_LAUNCH(kernel, blocks, kThreads, stream, plan, to_clamp<T>(bounds));
        return;
      }
    }
    constexpr auto kernel = Direction::template kKernel<range, T, Input, Output, Vectors<kItems, false>>;
    KL_EXT_LAUNCH(kernel, blocks, kThreads, stream, plan, to_clamp<T>(bounds));
  });
  return true;
}

template <class Direction, math::Range range, class T>
void run_strided(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  for_each_piece(iteration, kMaxStridedDims, fits_strided_indices, [&](const Iteration& piece) {
    const auto plan = plan_strides<Direction::kOperands>(piece);
    constexpr auto kernel = Direction::template kKernel<range, T, void, void, Strided<T>>;
    const std::uint32_t threads = (plan.numel + Strided<T>::kItems - 1) / Strided<T>::kItems;
    KL_EXT_LAUNCH(kernel, blocks_for(threads), kThreads, stream, plan, to_clamp<T>(bounds));
  });
}

template <class Direction, math::Range range, class T>
void run_range(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  bool done = run_vectors<Direction, range, T, T, T>(iteration, bounds, stream);
  if constexpr (sizeof(T) == sizeof(float)) {
    done = done || run_vectors<Direction, range, T, math::BFloat16, math::BFloat16>(iteration, bounds, stream);
    done = done || run_vectors<Direction, range, T, math::Half, math::Half>(iteration, bounds, stream);
    // Under autocast.
    done = done || run_vectors<Direction, range, T, math::BFloat16, float>(iteration, bounds, stream);
    done = done || run_vectors<Direction, range, T, math::Half, float>(iteration, bounds, stream);
  }
  if (!done) {
    run_strided<Direction, range, T>(iteration, bounds, stream);
  }
}

template <class Direction, class T>
void run_arithmetic(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  if (bounds.low >= -math::kNarrowBound<T> && bounds.high <= math::kNarrowBound<T>) {
    run_range<Direction, math::Range::kNarrow, T>(iteration, bounds, stream);
  } else {
    run_range<Direction, math::Range::kWide, T>(iteration, bounds, stream);
  }
}

template <class Direction>
void run(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  if (is_double(iteration)) {
    run_arithmetic<Direction, double>(iteration, bounds, stream);
  } else {
    run_arithmetic<Direction, float>(iteration, bounds, stream);
  }
}

} // namespace kl_ext::cuda
