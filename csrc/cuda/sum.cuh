// Which kernels of sum_kernels.cuh a summation takes, and their launches. Host code.
#pragma once

#include <algorithm>
#include <optional>

#include "sum_kernels.cuh"

namespace kl_ext::cuda {

// Whether threads may share lanes in sums by rows. Few gradients are sums by rows, and their terms would need much memory.
template <class Direction>
constexpr bool kMayShare = !Direction::kIsBackward;

// Launches a kernel on the layout, and returns what it leaves of a sum. plan: of the kernel's Access.

template <class Direction, math::Range range, class T, class Input, class Output, class Access, class Plan>
Partials launch_columns(const SumLayout& layout, const Plan& plan, SumShape<T> shape, const Settings& settings,
                        CUstream_st* stream) {
  constexpr int kItems = Access::kItems;
  const LaneSharing sharing(layout, kItems);
  const bool shares = sharing.sharers > 1;
  const std::int64_t of_column = sharing.lanes * sharing.sharers; // the threads of a column in a block
  const std::int64_t threads = shares ? std::min<std::int64_t>(kThreads, sharing.across * of_column)
                                      : block_of(sharing.across * sharing.lanes, layout.chunks);
  const std::int64_t width = std::min(threads / of_column, sharing.across);
  const std::int64_t tiles = ceil_divide(layout.sums, width * kItems);
  const std::int64_t blocks = tiles * ceil_divide(layout.chunks * sharing.parts, threads / (width * of_column));
  shape.threads = static_cast<std::uint32_t>(threads);
  shape.log_width = log2_of(width);
  shape.log_lanes = log2_of(sharing.lanes);
  shape.log_sharers = log2_of(sharing.sharers);
  shape.log_parts = log2_of(sharing.parts);
  shape.divider = Divider(tiles);
  shape.items = static_cast<std::uint32_t>(layout.chunks);
  const auto launch = [&]<bool kShares>() {
    constexpr auto kernel = sum_columns<Direction, range, T, Input, Output, Access, kShares>;
    KL_EXT_LAUNCH_EXCHANGING(kernel, static_cast<std::uint32_t>(blocks), shape.threads, stream, plan, shape,
                             to_settings<T>(settings));
  };
  shares ? launch.template operator()<true>() : launch.template operator()<false>();
  const bool are_lanes = sharing.parts > 1;
  return {are_lanes ? layout.chunks * math::kLanes : layout.chunks, are_lanes};
}

template <class Direction, math::Range range, class T, class Input, class Output, class Access, class Plan>
Partials launch_rows(const SumLayout& layout, const Plan& plan, SumShape<T> shape, const Settings& settings,
                     CUstream_st* stream) {
  const ChunkSharing sharing(layout, Access::kItems, kMayShare<Direction>);
  const std::int64_t of_chunk = sharing.of_chunk();
  const std::int64_t threads = Direction::kSharesQ ? kThreads : std::max(of_chunk, block_of(of_chunk, sharing.chunks));
  const bool shares = sharing.sharers > 1;
  const bool take_turns = kChunksTakeTurns<Access> && layout.chunks > math::kLanes && !shares && threads == kThreads;
  const std::int64_t turns = take_turns ? next_power_of_two(turns_of(layout.chunks)) : 1;
  const Partials partials{take_turns ? lanes_of(layout.chunks) : layout.chunks, take_turns};
  const std::int64_t items = partials.count * turns; // for each row
  shape.threads = static_cast<std::uint32_t>(threads);
  shape.log_width = log2_of(sharing.width);
  shape.log_sharers = log2_of(sharing.sharers);
  shape.log_turns = log2_of(turns);
  shape.divider = Divider(items);
  const std::int64_t rows = (KL_EXT_INDICES - kThreads) / of_chunk / items; // in one launch
  for (shape.first = 0; shape.first < layout.sums; shape.first += rows) {
    shape.items = static_cast<std::uint32_t>(std::min(rows, layout.sums - shape.first) * items);
    const std::int64_t blocks = ceil_divide(shape.items * of_chunk, threads);
    const auto launch = [&]<bool kShares>() {
      constexpr auto kernel = sum_rows<Direction, range, T, Input, Output, Access, kShares>;
      KL_EXT_LAUNCH_EXCHANGING(kernel, static_cast<std::uint32_t>(blocks), shape.threads, stream, plan, shape,
                               to_settings<T>(settings));
    };
    if constexpr (kMayShare<Direction>) {
      if (shares) {
        launch.template operator()<true>();
        continue;
      }
    }
    launch.template operator()<false>();
  }
  return partials;
}

// Launches by columns or by rows, as the layout says. RowTerms only exist for rows, the VectorTerms of directions that share q
// only for columns.
template <class Direction, math::Range range, class T, class Input, class Output, class Access, class Plan>
Partials launch_sums(const SumLayout& layout, const Plan& plan, SumShape<T> shape, const Settings& settings,
                     CUstream_st* stream) {
  static_assert(sizeof(Plan) + sizeof(SumShape<T>) + sizeof(math::Settings<T>) <= 4096);
  shape.count = layout.count;
  shape.columns = layout.sums;
  if constexpr (Access::kIsWhole) {
    return launch_rows<Direction, range, T, Input, Output, Access>(layout, plan, shape, settings, stream);
  } else if constexpr (Direction::kSharesQ) {
    return launch_columns<Direction, range, T, Input, Output, Access>(layout, plan, shape, settings, stream);
  } else {
    return layout.by_columns ? launch_columns<Direction, range, T, Input, Output, Access>(layout, plan, shape, settings, stream)
                             : launch_rows<Direction, range, T, Input, Output, Access>(layout, plan, shape, settings, stream);
  }
}

// Returns nothing if the operands' dtypes and layouts do not allow vectors.
template <class Direction, math::Range range, class T, class Input, class Output>
std::optional<Partials> run_vector_sums(const SumLayout& layout, const SumShape<T>& shape, const Settings& settings,
                                        CUstream_st* stream) {
  constexpr int kItems = kVectorBytes / (sizeof(Input) < sizeof(Output) ? sizeof(Input) : sizeof(Output));
  for (int i = 0; i < Direction::kOperands; ++i) {
    const Operand& operand = layout.terms.operand[i];
    const Storage dtype = i == Direction::kOutput ? kStorageOf<Output> : kStorageOf<Input>;
    if (operand.data != nullptr && operand.dtype != dtype) {
      return std::nullopt;
    }
  }
  if (layout.fast_dims == 0 || !fits_vectors(layout.terms, kItems, Direction::kOutputs) ||
      !fits_vector_indices(layout.terms, kItems)) {
    return std::nullopt;
  }
  if constexpr (!Direction::kIsBackward) { // gradients are summed where an operand is broadcast: in rows, a splat
    if (!layout.by_columns && is_in_rows(layout.terms) && layout.terms.sizes[0] % kItems == 0) {
      const auto plan = plan_rows<Direction::kOperands>(layout.terms, kItems);
      if constexpr (kMayShareQ<typename Direction::F>) {
        if (ChunkSharing(layout, kItems, true).prepares_q(layout, kMostColumns<T>)) {
          return launch_sums<GivenQ<Direction>, range, T, Input, Output, RowTerms<kItems>>(layout, plan, shape, settings,
                                                                                           stream);
        }
      }
      return launch_sums<Direction, range, T, Input, Output, RowTerms<kItems>>(layout, plan, shape, settings, stream);
    }
  }
  const auto plan = plan_vectors<Direction::kOperands>(layout.terms, kItems);
  if constexpr (kMayShareQ<typename Direction::F>) {
    if (shares_q(layout) && (!Direction::kIsBackward || only_q_is_summed(layout, shape.slots))) {
      return launch_sums<GivenQ<Direction>, range, T, Input, Output, VectorTerms<kItems>>(layout, plan, shape, settings,
                                                                                          stream);
    }
  }
  return launch_sums<Direction, range, T, Input, Output, VectorTerms<kItems>>(layout, plan, shape, settings, stream);
}

template <class Direction, math::Range range, class T>
Partials run_sums(const SumLayout& layout, const SumShape<T>& shape, const Settings& settings, CUstream_st* stream) {
  using F = typename Direction::F;
  std::optional<Partials> partials;
  [[maybe_unused]] const auto run = [&]<class Input, class Output>() {
    if (!partials) {
      partials = run_vector_sums<Direction, range, T, Input, Output>(layout, shape, settings, stream);
    }
  };
  // A wide clamp is rare: it has no vector kernels. For weights see run_range in elementwise.cuh.
  if constexpr (kIsUsual<F, range> && !F::kIsWeighted) {
    run.template operator()<T, T>();
    if constexpr (sizeof(T) == sizeof(float)) {
      run.template operator()<math::BFloat16, math::BFloat16>();
      run.template operator()<math::Half, math::Half>();
      if constexpr (Direction::kIsBackward) { // the gradient of a mean
        run.template operator()<math::BFloat16, float>();
        run.template operator()<math::Half, float>();
      }
    }
  }
  if (partials) {
    return *partials;
  }
  const auto plan = plan_terms<Direction::kOperands>(layout.terms);
  return launch_sums<Direction, range, T, void, void, StridedTerms<T, F::kIsWeighted>>(layout, plan, shape, settings, stream);
}

template <class Direction, class T>
void run_sum_arithmetic(const Summation& summation, const Settings& settings, const SumResults& results, T* scratch,
                        CUstream_st* stream) {
  const SumLayout layout = lay_out(summation);
  SumShape<T> shape{};
  shape.pitch = layout.outputs * layout.sums;
  shape.partials = layout.chunks > 1 ? scratch : nullptr;
  shape.divisor = static_cast<T>(summation.divisor);
  int slot = 0;
  for (int output = 0; output < kMaxOutputs; ++output) {
    shape.slots[output] = summation.summed[output] ? slot : -1;
    if (summation.summed[output]) {
      shape.results.data[output] = results.data[slot];
      shape.results.dtype[output] = results.dtype[slot];
      ++slot;
    }
  }
  Partials partials{};
  with_range<typename Direction::F, T>(
      settings, [&]<math::Range range>() { partials = run_sums<Direction, range, T>(layout, shape, settings, stream); });
  if (layout.chunks > 1) {
    kernels::finish_sums(scratch, partials, layout.outputs, layout.sums, summation.divisor, results,
                         scratch + partials.count * shape.pitch, stream);
  }
}

template <class Direction>
void run_sum(const Summation& summation, const Settings& settings, const SumResults& results, void* scratch,
             CUstream_st* stream) {
  if (is_double(summation.terms)) {
    run_sum_arithmetic<Direction>(summation, settings, results, static_cast<double*>(scratch), stream);
  } else {
    run_sum_arithmetic<Direction>(summation, settings, results, static_cast<float*>(scratch), stream);
  }
}

namespace kernels {

template <class F>
void forward_sum(const Summation& summation, const Settings& settings, const SumResults& results, void* scratch,
                 CUstream_st* stream) {
  run_sum<Forward<F>>(summation, settings, results, scratch, stream);
}

template <class F>
void backward_sum(const Summation& summation, const Settings& settings, const SumResults& results, void* scratch,
                  CUstream_st* stream) {
  run_sum<Backward<F>>(summation, settings, results, scratch, stream);
}

} // namespace kernels

} // namespace kl_ext::cuda
