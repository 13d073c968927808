// Turns a summation into kernel launches: the order of the dimensions, the chunks of a sum, how threads share them. Host code.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "../math/summation.h"
#include "layout.h"
#include "tuning.h"

namespace kl_ext::cuda {

constexpr int kMostItems = 8; // of a thread

// The threads per block, for a launch of threads * count of them or more.
inline std::int64_t block_of(std::int64_t threads, std::int64_t count) {
  return count <= KL_EXT_FEW_THREADS / threads ? 64 : kThreads;
}

// A tensor that merges to more dimensions has at least 2^36 terms. Kernel parameters are limited to 4 KiB.
constexpr int kMaxSumDims = 36;
constexpr std::int64_t kMaxTerms = std::int64_t{1} << 35; // of a sum: the chunks of one fit a launch
// The most groups that one block finally sums up, of 1024 chunks each, again by 64 lanes.
constexpr int kMaxGroups = math::kChunk;

KL_EXT_INLINE constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline std::int64_t next_power_of_two(std::int64_t n) {
  std::int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

inline int log2_of(std::int64_t power) {
  int log = 0;
  while (power > 1) {
    power /= 2;
    ++log;
  }
  return log;
}

// The lanes that the chunks of a sum reach: lane 64 g + l has chunks l, l + 64, ... of group g.
inline std::int64_t lanes_of(std::int64_t chunks) {
  const std::int64_t before = (chunks - 1) / math::kChunk;
  return before * math::kLanes + std::min<std::int64_t>(math::kLanes, chunks - before * math::kChunk);
}

// The chunks that take turns in the fullest lane.
inline std::int64_t turns_of(std::int64_t chunks) {
  return ceil_divide(std::min<std::int64_t>(chunks, math::kChunk), math::kLanes);
}

// The first chunk of a partial sum, which is a chunk, or a lane of chunks if they take turns.
KL_EXT_INLINE std::int64_t chunk_of(std::uint32_t partial, std::int32_t log_turns) {
  constexpr std::uint32_t kBetween = math::kChunk - math::kLanes; // chunks of a group that are not the first of a lane
  return static_cast<std::int64_t>(partial) + (log_turns > 0 ? partial / math::kLanes * std::int64_t{kBetween} : 0);
}

// The threads that share each lane of a sum of `count` terms, a power of two, in a launch of so many threads without sharing.
inline std::int64_t sharers_of(std::int64_t count, std::int64_t threads, std::int64_t most) {
  const std::int64_t steps = ceil_divide(std::min<std::int64_t>(count, math::kChunk), math::kLanes); // of a lane
  const std::int64_t few = std::min(KL_EXT_SHARING_THREADS, KL_EXT_INDICES - kThreads);
  most = std::min<std::int64_t>(most, KL_EXT_MOST_SHARERS);
  std::int64_t sharers = 1;
  while (sharers < steps && 2 * sharers <= most && 2 * sharers * threads <= few) {
    sharers *= 2;
  }
  return sharers;
}

struct SumLayout {
  // Either the reduced dimensions come first, or the kept ones. Ranks among both are row-major.
  Iteration terms;
  bool by_columns;
  int fast_dims;          // the number of those that come first
  std::int64_t count = 1; // terms of a sum
  std::int64_t sums = 1;  // of an output
  int outputs = 0;        // summed ones
  std::int64_t chunks;    // of a sum
};

// The reduced or the kept dimensions, with two merged where every operand walks them as one.
inline Iteration merged(const Summation& summation, bool reduced) {
  const Iteration& terms = summation.terms;
  Iteration result;
  result.operands = terms.operands;
  for (int dim = 0; dim < terms.ndim; ++dim) {
    if (summation.reduced[dim] != reduced || terms.sizes[dim] == 1) {
      continue;
    }
    const int last = result.ndim - 1;
    bool merges = last >= 0;
    for (int i = 0; merges && i < terms.operands; ++i) {
      merges = terms.operand[i].strides[dim] == result.operand[i].strides[last] * result.sizes[last];
    }
    if (merges) {
      result.sizes[last] *= terms.sizes[dim];
      continue;
    }
    result.sizes[result.ndim] = terms.sizes[dim];
    for (int i = 0; i < terms.operands; ++i) {
      result.operand[i].strides[result.ndim] = terms.operand[i].strides[dim];
    }
    ++result.ndim;
  }
  return result;
}

// Whether most operands have a smaller stride along the fastest kept dimension than along the fastest reduced one.
inline bool kept_is_fast(const Iteration& kept, const Iteration& reduced) {
  int votes = 0;
  for (int i = 0; kept.ndim > 0 && reduced.ndim > 0 && i < kept.operands; ++i) {
    const std::int64_t kept_stride = kept.operand[i].strides[0];
    const std::int64_t reduced_stride = reduced.operand[i].strides[0];
    if (kept_stride != 0 && reduced_stride != 0) {
      votes += std::abs(kept_stride) < std::abs(reduced_stride) ? 1 : -1;
    }
  }
  return votes > 0;
}

inline SumLayout lay_out(const Summation& summation) {
  const Iteration kept = merged(summation, false);
  const Iteration reduced = merged(summation, true);
  SumLayout layout;
  layout.by_columns = kept_is_fast(kept, reduced);
  const Iteration& fast = layout.by_columns ? kept : reduced;
  const Iteration& slow = layout.by_columns ? reduced : kept;
  layout.terms = fast;
  layout.fast_dims = fast.ndim;
  for (int dim = 0; dim < slow.ndim; ++dim) {
    layout.terms.sizes[fast.ndim + dim] = slow.sizes[dim];
  }
  layout.terms.ndim = fast.ndim + slow.ndim;
  for (int i = 0; i < fast.operands; ++i) {
    Operand& operand = layout.terms.operand[i];
    operand.data = summation.terms.operand[i].data;
    operand.dtype = summation.terms.operand[i].dtype;
    for (int dim = 0; dim < slow.ndim; ++dim) {
      operand.strides[fast.ndim + dim] = slow.operand[i].strides[dim];
    }
  }
  if (layout.terms.ndim == 0) { // a single term
    layout.terms.ndim = 1;
    layout.terms.sizes[0] = 1;
  }
  for (int dim = 0; dim < kept.ndim; ++dim) {
    layout.sums *= kept.sizes[dim];
  }
  for (int dim = 0; dim < reduced.ndim; ++dim) {
    layout.count *= reduced.sizes[dim];
  }
  layout.chunks = ceil_divide(layout.count, math::kChunk);
  for (const bool summed : summation.summed) {
    layout.outputs += summed ? 1 : 0;
  }
  return layout;
}

// Whether every column of a pair's terms has its own q.
inline bool shares_q(const SumLayout& layout) {
  const Iteration& terms = layout.terms;
  bool shares = layout.by_columns;
  for (int i = terms.operands - 2; i < terms.operands; ++i) {
    for (int dim = layout.fast_dims; dim < terms.ndim; ++dim) {
      shares &= terms.operand[i].strides[dim] == 0;
    }
  }
  return shares;
}

// Of the gradients of a pair: whether those of q are sums, and those of p are not. slots: see SumShape.
inline bool only_q_is_summed(const SumLayout& layout, const std::int32_t (&slots)[kMaxOutputs]) {
  const auto& operand = layout.terms.operand;
  return slots[0] < 0 && slots[1] < 0 && operand[2].data == nullptr && operand[3].data == nullptr;
}

// How the threads of a sum by columns share its lanes; `items`: the columns of a thread. Where threads share lanes and a sum is
// many chunks, a block has so few lanes of a chunk that its threads reach across neighbouring columns, and leaves sums of lanes.
struct LaneSharing {
  std::int64_t across;  // threads beside each other, at most
  std::int64_t sharers; // threads of a lane
  std::int64_t lanes;   // of a block and chunk
  std::int64_t parts;   // blocks that have the lanes of a chunk

  LaneSharing(const SumLayout& layout, int items) : across(next_power_of_two(ceil_divide(layout.sums, items))) {
    const std::int64_t in_use = math::lanes_in_use(layout.count);
    const std::int64_t most = layout.chunks > 1 ? KL_EXT_MOST_SHARERS : kThreads / in_use;
    sharers = sharers_of(layout.count, across * in_use * layout.chunks, most);
    lanes = in_use;
    if (sharers > 1 && layout.chunks > 1) {
      lanes = std::min(in_use, kThreads / (std::min<std::int64_t>(across, KL_EXT_WIDTH_OF_PARTS) * sharers));
    }
    parts = in_use / lanes;
  }
};

// How the threads of a sum by rows share its chunks; `items`: the numbers of a thread.
struct ChunkSharing {
  std::int64_t width;   // threads of a chunk, without sharing
  std::int64_t sharers; // threads of a lane
  std::int64_t chunks;  // of all sums

  ChunkSharing(const SumLayout& layout, int items, bool may_share)
      : width(std::max<std::int64_t>(1, math::lanes_in_use(layout.count) / items)),
        sharers(may_share ? sharers_of(layout.count, width * layout.sums * layout.chunks, kThreads / width) : 1),
        chunks(layout.sums * layout.chunks) {}

  std::int64_t of_chunk() const { return width * sharers; }

  // Whether each block computes what depends on q alone: all rows have one q, and there are rows enough in a block.
  bool prepares_q(const SumLayout& layout, std::int64_t most_columns) const {
    const Iteration& terms = layout.terms;
    bool fits = !layout.by_columns && terms.ndim == 2 && terms.sizes[0] <= most_columns;
    for (int i = terms.operands - 2; i < terms.operands; ++i) {
      fits &= terms.operand[i].strides[1] == 0;
    }
    const std::int64_t of_block = kThreads / of_chunk() * std::min<std::int64_t>(layout.count, math::kChunk); // terms
    return fits && chunks * of_chunk() >= KL_EXT_PREPARING_THREADS && of_block >= KL_EXT_PREPARING_ROWS * terms.sizes[0];
  }
};

// The most numbers of the arithmetic type that a sum keeps between its launches: its partial sums, and what finish_sums makes
// of them before it is done.
inline std::int64_t scratch_numel(const Summation& summation) {
  const SumLayout layout = lay_out(summation);
  // More items to a thread are fewer threads, more of which share lanes.
  const bool may_leave_lanes = layout.by_columns && LaneSharing(layout, kMostItems).sharers > 1;
  const std::int64_t partials = may_leave_lanes ? layout.chunks * math::kLanes : layout.chunks;
  const std::int64_t parts = ceil_divide(layout.chunks, may_leave_lanes ? kMaxGroups : std::int64_t{kMaxGroups} * math::kChunk);
  return layout.chunks > 1 ? (partials + parts) * layout.outputs * layout.sums : 0;
}

// The parameters of a summing kernel. `width` neighbouring threads share a chunk (rows), or have a column each (columns).
template <class T>
struct SumShape {
  T* partials;           // [partial sums, summed outputs, sums]; null if a sum is a single chunk
  SumResults results;    // by output
  std::int64_t pitch;    // of the partial sums
  std::int64_t count;    // terms of a sum
  std::int64_t columns;  // sums of an output
  std::int64_t first;    // the first sum of this launch
  std::uint32_t threads; // of a block
  std::uint32_t items;   // rows: chunks of all sums of this launch; columns: chunks
  Divider divider;       // rows: the items of a sum; columns: the tiles that are beside each other
  std::int32_t log_width;
  std::int32_t log_lanes;          // columns: the threads of a column
  std::int32_t log_turns;          // rows: the items that take turns in a lane
  std::int32_t log_sharers;        // the threads that share each lane
  std::int32_t log_parts;          // columns: the blocks that have the lanes of a chunk
  std::int32_t slots[kMaxOutputs]; // the index of an output among the summed ones, or -1
  T divisor;
};

// Operands of a launch that sums terms in rows: the number of vectors in a row, and each operand's vectors between rows.
template <int kOperands>
struct RowPlan {
  Divider vectors;
  std::uint32_t pitch[kOperands];
  char* data[kOperands];
};

template <int kOperands>
RowPlan<kOperands> plan_rows(const Iteration& terms, int items) {
  RowPlan<kOperands> plan;
  plan.vectors = Divider(terms.sizes[0] / items);
  for (int i = 0; i < kOperands; ++i) {
    const Operand& operand = terms.operand[i];
    plan.data[i] = operand.data;
    plan.pitch[i] = terms.ndim == 1 ? 0 : static_cast<std::uint32_t>(operand.strides[1] / kVectorBytes);
  }
  return plan;
}

// Operands of a launch of a strided summing kernel: byte offsets are 64-bit.
template <int kOperands>
struct TermsPlan {
  struct Operand {
    char* data;
    Storage dtype;
  };

  bool is_small; // whether ranks of terms fit 32 bits
  std::int32_t ndim;
  std::int64_t sizes[kMaxSumDims];
  Divider dividers[kMaxSumDims]; // if small
  std::int64_t strides[kMaxSumDims][kOperands];
  Operand operand[kOperands];
};

template <int kOperands>
TermsPlan<kOperands> plan_terms(const Iteration& terms) {
  TermsPlan<kOperands> plan{};
  plan.is_small = numel_of(terms) < KL_EXT_INDICES;
  plan.ndim = terms.ndim;
  for (int dim = 0; dim < terms.ndim; ++dim) {
    plan.sizes[dim] = terms.sizes[dim];
    if (plan.is_small) {
      plan.dividers[dim] = Divider(terms.sizes[dim]);
    }
    for (int i = 0; i < kOperands; ++i) {
      plan.strides[dim][i] = terms.operand[i].strides[dim];
    }
  }
  for (int i = 0; i < kOperands; ++i) {
    plan.operand[i] = {terms.operand[i].data, terms.operand[i].dtype};
  }
  return plan;
}

} // namespace kl_ext::cuda
