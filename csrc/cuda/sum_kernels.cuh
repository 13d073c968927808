// The kernels that sum terms in the order of math/summation.h. Each computes the sum of a chunk of at most 1024 terms, or of a
// lane of chunks; finish.cu adds up the lanes. Gradients that are not summed are written in the same pass.
#pragma once

#include "exchange.cuh"
#include "sum_terms.cuh"

namespace kl_ext::cuda {

// Like blocks_per_processor in elementwise.cuh. Half types are bound by their arithmetic, which more warps keep busier.
template <class Direction, math::Range range, class T, class Access, bool kShares = false>
constexpr int sum_blocks_per_processor() {
  constexpr bool kIsWeighted = Direction::F::kIsWeighted;
  if (sizeof(T) == sizeof(double) && (Direction::kIsBackward || kIsWeighted) && range == math::Range::kWide) {
    return 1;
  }
  if (!Access::kNeighbours && (Direction::kIsBackward || kIsWeighted)) { // for the offsets of many operands
    return 2;
  }
  if (kShares) { // launches of few threads do not fill a multiprocessor
    return Direction::kIsBackward && !Direction::kSharesQ && Direction::kOutputs * Access::kItems > 16 ? 1 : 2;
  }
  const bool keeps_q = Direction::kSharesQ && !Access::kIsWhole;
  const bool keeps_much = Direction::kOutputs * Access::kItems > 16 || (keeps_q && Access::kItems > 4);
  if (sizeof(T) == sizeof(double) || keeps_much) {
    return 2;
  }
  return Access::kIsWhole && Access::kItems == 8 ? 4 : 3;
}

// Whether the 16 chunks that take turns in a lane fit a block together, which holds kThreads * kItems / 64 chunks.
template <class Access>
constexpr bool kChunksTakeTurns = Access::kNeighbours && kThreads * Access::kItems >= math::kChunk;

// For the first of the chunks that take turns: the sum of the chunks in the block's places from this one on.
template <class T, class Shared>
KL_EXT_DEVICE T add_turns(T of_chunk, Shared of_chunks, std::uint32_t place, bool speaks, bool adds, std::uint32_t turns) {
  if (speaks) {
    of_chunks[place] = of_chunk;
  }
  __syncthreads();
  T sum = T(0);
  if (speaks && adds) {
    for (std::uint32_t turn = 0; turn < turns; ++turn) {
      sum += of_chunks[place + turn]; // a sum is never -0: adding +0 for a missing chunk does not change it
    }
  }
  return sum;
}

// Writes a kernel's results, in columns `gap` apart: partial sums, or the sums themselves, divided unless they are gradients.
template <class Direction, class T, int kItems>
KL_EXT_INLINE void leave(const SumShape<T>& shape, int output, std::int64_t partial, std::int64_t column, std::int64_t gap,
                         std::int64_t valid, T (&sums)[kItems]) {
  if (shape.partials != nullptr) {
    T* const partials = shape.partials + partial * shape.pitch + shape.slots[output] * shape.columns + column;
    KL_EXT_UNROLL
    for (int item = 0; item < kItems; ++item) {
      if (item < valid) {
        partials[item * gap] = sums[item];
      }
    }
    return;
  }
  if constexpr (!Direction::kIsBackward) {
    for (int item = 0; item < kItems; ++item) {
      sums[item] /= shape.divisor;
    }
  }
  store_rounded(shape.results.data[output], shape.results.dtype[output], column, gap, valid, sums);
}

// The terms of a chunk, unless it is the last and shorter.
template <class T>
KL_EXT_INLINE std::int32_t most_of_chunk(const SumShape<T>& shape) {
  return static_cast<std::int32_t>(shape.count < math::kChunk ? shape.count : math::kChunk);
}

// Rows: the reduced dimensions are the fast ones. A chunk belongs to `width` neighbouring threads, a power of two; together
// they have one lane for each of their items: lane = items * thread + item for neighbours, else thread + width * item. Where
// n threads share each lane, a chunk has n * width threads. In sums of more than 64 chunks, those that take turns in a lane are
// beside each other in a block.
template <class Direction, math::Range range, class T, class Input, class Output, class Access, bool kShares>
__global__ void __launch_bounds__(kThreads, sum_blocks_per_processor<Direction, range, T, Access, kShares>())
    sum_rows(const typename Access::template Plan<Direction::kOperands> plan, const SumShape<T> shape,
             const math::Settings<T> settings) {
  KL_EXT_LET_NEXT_BEGIN();
  constexpr int kItems = Access::kItems;
  constexpr int kPlaces = kThreads * kItems / math::kLanes;
  KL_EXT_SHARED(T, of_chunks, Direction::kOutputs * kPlaces);
  const std::uint32_t width = 1u << shape.log_width;
  const std::uint32_t thread = threadIdx.x & (width - 1);
  const std::int32_t log_sharers = kShares ? shape.log_sharers : 0;
  const std::uint32_t sharer = (threadIdx.x >> shape.log_width) & ((1u << log_sharers) - 1);
  const std::uint32_t item_index = (blockIdx.x * shape.threads + threadIdx.x) >> (shape.log_width + log_sharers);
  const std::uint32_t row = shape.divider.quotient(item_index);
  const std::int32_t log_turns = kChunksTakeTurns<Access> && !kShares ? shape.log_turns : 0;
  const std::uint32_t partial = (item_index - row * shape.divider.divisor) >> log_turns;
  const std::uint32_t turn = item_index & ((1u << log_turns) - 1);
  const std::int64_t first_term = (chunk_of(partial, log_turns) + turn * math::kLanes) * math::kChunk;
  const bool is_idle = item_index >= shape.items;
  const std::int64_t left = is_idle ? 0 : shape.count - first_term;
  const std::int32_t count = static_cast<std::int32_t>(left < math::kChunk ? left : math::kChunk);
  auto origin = Access::index_of((shape.first + row) * shape.count + first_term);
  KL_EXT_KEEP(origin);
  const std::int32_t log_gap = Access::kNeighbours ? 0 : shape.log_width;
  const std::int32_t gap = 1 << log_gap;

  const auto valid = [&](std::int32_t term) { return (count - term + gap - 1) >> log_gap; };
  const auto at = [&](std::int32_t term) {
    return typename Access::template Thread<Direction::kOperands>{plan, origin + Access::index_of(term), gap, valid(term)};
  };
  const auto q = [&] { // of all rows
    if constexpr (Direction::kSharesQ) {
      KL_EXT_SHARED(T, columns_q, 3 * kMostColumns<T>);
      const SharedQ<Direction, T, Access, decltype(columns_q + 0)> shared(columns_q + 0);
      shared.template fill<Input>(plan, shape.threads, settings);
      return shared;
    } else {
      return Q<Direction, T, Access>{};
    }
  }();
  T lanes[Direction::kOutputs][kItems] = {};
  const std::int32_t first = thread * (Access::kNeighbours ? kItems : 1);
  if constexpr (kShares) {
    KL_EXT_SHARED(T, exchange, kItems * kThreads);
    const std::int32_t lanes_in_use = width * kItems;
    const Sharers sharers{1u << log_sharers, sharer, width};
    add_shared_terms<Direction, range, T, Input, Output, Access>(sharer * lanes_in_use + first, lanes_in_use << log_sharers,
                                                                 count, most_of_chunk(shape), settings, at, valid, q, sharers,
                                                                 shape.slots, exchange, lanes);
  } else {
    add_terms<Direction, range, T, Input, Output, Access>(first, width * kItems, count, settings, at, valid, q, lanes);
  }
  KL_EXT_UNROLL
  for (int output = 0; output < Direction::kOutputs; ++output) {
    if (shape.slots[output] < 0) {
      continue;
    }
    T sum[1] = {fold_among_neighbours<Access::kNeighbours>(lanes[output], width)};
    if constexpr (kChunksTakeTurns<Access> && !kShares) {
      if (log_turns > 0) {
        const std::uint32_t place = output * kPlaces + (threadIdx.x >> shape.log_width);
        sum[0] = add_turns(sum[0], of_chunks, place, thread == 0, turn == 0, 1u << log_turns);
      }
    }
    if (thread == 0 && sharer == 0 && turn == 0 && !is_idle) {
      leave<Direction>(shape, output, partial, shape.first + row, 0, 1, sum);
    }
  }
}

// Columns: the kept dimensions are the fast ones. A thread has one lane of as many columns as it has items; `width`
// neighbouring threads have neighbouring columns; a block has as many chunks as fit. Where n threads share each lane, a column
// has n times as many threads. A block may then have only a part of the lanes of a chunk; it leaves the sums of its lanes.
template <class Direction, math::Range range, class T, class Input, class Output, class Access, bool kShares>
__global__ void __launch_bounds__(kThreads, sum_blocks_per_processor<Direction, range, T, Access, kShares>())
    sum_columns(const typename Access::template Plan<Direction::kOperands> plan, const SumShape<T> shape,
                const math::Settings<T> settings) {
  KL_EXT_LET_NEXT_BEGIN();
  constexpr int kItems = Access::kItems;
  KL_EXT_SHARED(T, exchange, kItems * kThreads / (kShares ? 1 : 2));
  const std::uint32_t width = 1u << shape.log_width;
  const std::uint32_t lane_count = 1u << shape.log_lanes;
  const std::uint32_t lane_in_block = (threadIdx.x >> shape.log_width) & (lane_count - 1);
  const std::int32_t log_sharers = kShares ? shape.log_sharers : 0;
  const std::int32_t log_parts = kShares ? shape.log_parts : 0;
  const std::uint32_t sharer = (threadIdx.x >> (shape.log_width + shape.log_lanes)) & ((1u << log_sharers) - 1);
  const std::uint32_t row_of_tiles = shape.divider.quotient(blockIdx.x);
  const std::uint32_t tile = blockIdx.x - row_of_tiles * shape.divider.divisor;
  const std::uint32_t log_part_threads = shape.log_width + shape.log_lanes + log_sharers;
  const std::uint32_t place = row_of_tiles * (shape.threads >> log_part_threads) + (threadIdx.x >> log_part_threads);
  const std::uint32_t chunk = place >> log_parts;
  const std::uint32_t lane = ((place & ((1u << log_parts) - 1)) << shape.log_lanes) + lane_in_block;
  const std::int32_t log_gap = Access::kNeighbours ? 0 : shape.log_width;
  const std::int32_t gap = 1 << log_gap;
  const std::int64_t column =
      (static_cast<std::int64_t>(tile) * width * kItems) + (threadIdx.x & (width - 1)) * (Access::kNeighbours ? kItems : 1);
  const std::int64_t valid = column < shape.columns ? (shape.columns - column + gap - 1) >> log_gap : 0;
  const std::int64_t first_term = static_cast<std::int64_t>(chunk) * math::kChunk;
  const std::int64_t left = chunk < shape.items && valid > 0 ? shape.count - first_term : 0;
  const std::int32_t count = static_cast<std::int32_t>(left < math::kChunk ? left : math::kChunk);
  auto origin = Access::index_of(first_term * shape.columns + column);
  KL_EXT_KEEP(origin);
  const auto pitch = Access::index_of(shape.columns);

  const auto at = [&](std::int32_t term) {
    return typename Access::template Thread<Direction::kOperands>{plan, origin + term * pitch, gap, valid};
  };
  const auto all = [](std::int32_t) { return kItems; }; // missing columns are computed but not written
  T lanes[Direction::kOutputs][kItems] = {};
  Q<Direction, T, Access> q;
  if constexpr (Direction::kSharesQ) {
    if (lane < count) {
      q.template load<Input>(at(lane), settings);
    }
  }
  if constexpr (kShares) {
    const std::int32_t lanes_in_use = lane_count << log_parts;
    const Sharers sharers{1u << log_sharers, sharer, lane_count << shape.log_width};
    add_shared_terms<Direction, range, T, Input, Output, Access>(lane + sharer * lanes_in_use, lanes_in_use << log_sharers,
                                                                 count, most_of_chunk(shape), settings, at, all, q, sharers,
                                                                 shape.slots, exchange, lanes);
    if (log_parts > 0) {
      KL_EXT_UNROLL
      for (int output = kFirstSummed<Direction>; output < Direction::kOutputs; ++output) {
        if (shape.slots[output] >= 0 && sharer == 0 && count > 0) {
          leave<Direction>(shape, output, std::int64_t{chunk} * math::kLanes + lane, column, gap, valid, lanes[output]);
        }
      }
      return;
    }
  } else {
    add_terms<Direction, range, T, Input, Output, Access>(lane, lane_count, count, settings, at, all, q, lanes);
  }
  KL_EXT_UNROLL
  for (int output = kFirstSummed<Direction>; output < Direction::kOutputs; ++output) {
    if (shape.slots[output] >= 0) {
      fold_across_block(lanes[output], exchange, lane_in_block, lane_count, width);
      if (lane == 0 && sharer == 0 && count > 0) {
        leave<Direction>(shape, output, chunk, column, gap, valid, lanes[output]);
      }
    }
  }
}

} // namespace kl_ext::cuda
