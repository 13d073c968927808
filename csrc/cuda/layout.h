// Turns an iteration into kernel launches: decides whether 16-byte vectors will do, and cuts pieces small enough for 32-bit
// indices. Host code, except for the divider.
#pragma once

#include "kernels.h"
#include "tuning.h"

// The range of signed 32-bit indices. An emulation of CUDA on the host makes it smaller, so that small tensors are cut like
// large ones.
#if !defined(KL_EXT_INDICES)
#define KL_EXT_INDICES (std::int64_t{1} << 31)
#endif

namespace kl_ext::cuda {

constexpr std::uint32_t kThreads = 256; // of a block; the most, in sums
constexpr std::uint32_t kElementwiseThreads = KL_EXT_ELEMENTWISE_THREADS;
constexpr std::int64_t kVectorBytes = 16;
constexpr int kMaxVectorDims = 4;
constexpr int kMaxStridedDims = 25;

// Divides by a number fixed on the host, for dividends below 2^31: n / d = (n * (2^32 + magic) >> 32) >> log_divisor (Granlund
// and Montgomery, Division by Invariant Integers using Multiplication, 1994).
struct Divider {
  std::uint32_t divisor = 1;
  std::uint32_t magic = 1;
  std::uint32_t log_divisor = 0;

  Divider() = default;

  explicit Divider(std::int64_t size) : divisor(static_cast<std::uint32_t>(size)) {
    while ((std::uint64_t{1} << log_divisor) < divisor) {
      ++log_divisor;
    }
    magic = static_cast<std::uint32_t>((((std::uint64_t{1} << log_divisor) - divisor) << 32) / divisor + 1);
  }

  KL_EXT_INLINE std::uint32_t quotient(std::uint32_t n) const {
    return (static_cast<std::uint32_t>((std::uint64_t{n} * magic) >> 32) + n) >> log_divisor;
  }
};

// Operands of one launch of a vector kernel. An operand is walked in units: whole vectors, or single numbers where it does not
// change along dimension 0 (a splat). Unit offsets are 32-bit, which suffices for 64 GiB.
template <int kOperands>
struct VectorPlan {
  struct Operand {
    char* data;
    std::uint32_t strides[kMaxVectorDims];
    bool is_splat;
  };

  std::uint32_t vectors; // the whole ones
  std::uint32_t tail;    // the numbers after them; 0 unless there is one dimension only
  std::int32_t ndim;
  Divider sizes[kMaxVectorDims - 1]; // dimension 0 in vectors
  Operand operand[kOperands];
};

// Operands of one launch of a strided kernel. Byte offsets are 32-bit.
template <int kOperands>
struct StridedPlan {
  struct Operand {
    char* data;
    Storage dtype;
  };

  std::uint32_t numel;
  std::int32_t ndim;
  Divider sizes[kMaxStridedDims];
  std::int32_t strides[kMaxStridedDims][kOperands];
  Operand operand[kOperands];
};

// Whether the arithmetic is in float64.
inline bool is_double(const Iteration& iteration) {
  bool any = false;
  for (int i = 0; i < iteration.operands; ++i) {
    any |= iteration.operand[i].dtype == kFloat64;
  }
  return any;
}

inline std::int64_t numel_of(const Iteration& iteration) {
  std::int64_t numel = 1;
  for (int dim = 0; dim < iteration.ndim; ++dim) {
    numel *= iteration.sizes[dim];
  }
  return numel;
}

// The bytes between the first and the last number of an operand.
inline std::int64_t extent_of(const Iteration& iteration, const Operand& operand) {
  std::int64_t extent = 0;
  for (int dim = 0; dim < iteration.ndim; ++dim) {
    const std::int64_t stride = operand.strides[dim];
    extent += (iteration.sizes[dim] - 1) * (stride < 0 ? -stride : stride);
  }
  return extent;
}

// Whether an operand is read vector by vector, not as a splat.
inline bool is_vector(const Operand& operand) { return operand.strides[0] == size_of(operand.dtype); }

// The bytes of a vector of `items` numbers, or of the single number of a splat.
inline std::int64_t unit_of(const Operand& operand, int items) {
  return (is_vector(operand) ? items : 1) * size_of(operand.dtype);
}

// Whether every operand consists of aligned vectors of `items` numbers or is a splat. The caller has to check dtypes.
inline bool fits_vectors(const Iteration& iteration, int items, int outputs) {
  if (iteration.ndim > kMaxVectorDims || (iteration.ndim > 1 && iteration.sizes[0] % items != 0)) {
    return false;
  }
  for (int i = 0; i < iteration.operands; ++i) {
    const Operand& operand = iteration.operand[i];
    if (operand.data == nullptr) {
      continue;
    }
    const bool vector = is_vector(operand);
    const std::int64_t unit = unit_of(operand, items);
    bool fits = vector || (i >= outputs && operand.strides[0] == 0);
    fits &= !vector || reinterpret_cast<std::uintptr_t>(operand.data) % kVectorBytes == 0;
    for (int dim = 1; dim < iteration.ndim; ++dim) {
      fits &= operand.strides[dim] >= 0 && operand.strides[dim] % unit == 0;
    }
    if (!fits) {
      return false;
    }
  }
  return true;
}

// Whether the operands, which fit vectors, are rows of them; the distance of rows may differ between operands.
inline bool is_in_rows(const Iteration& iteration) {
  bool in_rows = iteration.ndim <= 2;
  for (int i = 0; i < iteration.operands; ++i) {
    in_rows &= iteration.operand[i].data == nullptr || is_vector(iteration.operand[i]);
  }
  return in_rows;
}

template <int kOperands>
VectorPlan<kOperands> plan_vectors(const Iteration& iteration, int items) {
  VectorPlan<kOperands> plan{};
  const std::int64_t numel = numel_of(iteration);
  plan.vectors = static_cast<std::uint32_t>(numel / items);
  plan.tail = static_cast<std::uint32_t>(numel % items);
  plan.ndim = iteration.ndim;
  plan.sizes[0] = Divider(std::int64_t{plan.vectors} + 1); // with the tail, since all of them are in the first row
  for (int dim = 0; dim + 1 < iteration.ndim; ++dim) {
    plan.sizes[dim] = Divider(dim == 0 ? iteration.sizes[0] / items : iteration.sizes[dim]);
  }
  for (int i = 0; i < kOperands; ++i) {
    const Operand& operand = iteration.operand[i];
    const bool vector = is_vector(operand);
    const std::int64_t unit = unit_of(operand, items);
    plan.operand[i].data = operand.data;
    plan.operand[i].is_splat = !vector;
    plan.operand[i].strides[0] = vector ? 1 : 0;
    for (int dim = 1; dim < iteration.ndim; ++dim) {
      plan.operand[i].strides[dim] = static_cast<std::uint32_t>(operand.strides[dim] / unit);
    }
  }
  return plan;
}

template <int kOperands>
StridedPlan<kOperands> plan_strides(const Iteration& iteration) {
  StridedPlan<kOperands> plan{};
  plan.numel = static_cast<std::uint32_t>(numel_of(iteration));
  plan.ndim = iteration.ndim;
  for (int dim = 0; dim < iteration.ndim; ++dim) {
    plan.sizes[dim] = Divider(iteration.sizes[dim]);
    for (int i = 0; i < kOperands; ++i) {
      plan.strides[dim][i] = static_cast<std::int32_t>(iteration.operand[i].strides[dim]);
    }
  }
  for (int i = 0; i < kOperands; ++i) {
    plan.operand[i] = {iteration.operand[i].data, iteration.operand[i].dtype};
  }
  return plan;
}

// Keeps `size` coordinates of a dimension, from `start` on.
inline Iteration narrowed(Iteration iteration, int dim, std::int64_t start, std::int64_t size) {
  iteration.sizes[dim] = size;
  for (int i = 0; i < iteration.operands; ++i) {
    Operand& operand = iteration.operand[i];
    operand.data = operand.data == nullptr ? nullptr : operand.data + start * operand.strides[dim];
  }
  return iteration;
}

// The dimension along which some operand spans the most bytes.
inline int dim_to_cut(const Iteration& iteration) {
  int chosen = 0;
  std::int64_t largest = -1;
  for (int dim = 0; dim < iteration.ndim; ++dim) {
    for (int i = 0; i < iteration.operands; ++i) {
      const std::int64_t stride = iteration.operand[i].strides[dim];
      const std::int64_t extent = (iteration.sizes[dim] - 1) * (stride < 0 ? -stride : stride);
      chosen = extent > largest ? dim : chosen;
      largest = extent > largest ? extent : largest;
    }
  }
  return chosen;
}

// Calls run(piece) for the pieces of an iteration; a tensor of ordinary size is a single piece. Each has at most max_dims
// dimensions and satisfies fits(piece). Cuts are at powers of two, which keeps alignment and divisibility.
template <class Fits, class Run>
void for_each_piece(const Iteration& iteration, int max_dims, const Fits& fits, const Run& run) {
  if (iteration.ndim > max_dims) {
    const int outermost = iteration.ndim - 1;
    for (std::int64_t i = 0; i < iteration.sizes[outermost]; ++i) {
      Iteration piece = narrowed(iteration, outermost, i, 1);
      piece.ndim = outermost;
      for_each_piece(piece, max_dims, fits, run);
    }
  } else if (fits(iteration)) {
    run(iteration);
  } else {
    const int dim = dim_to_cut(iteration);
    const std::int64_t size = iteration.sizes[dim];
    std::int64_t cut = 1;
    while (2 * cut < size) {
      cut *= 2;
    }
    for_each_piece(narrowed(iteration, dim, 0, cut), max_dims, fits, run);
    for_each_piece(narrowed(iteration, dim, cut, size - cut), max_dims, fits, run);
  }
}

// Whether unit offsets (see VectorPlan) and the number of vectors stay within 32 bits.
inline bool fits_vector_indices(const Iteration& iteration, int items) {
  bool fits = numel_of(iteration) / items < KL_EXT_INDICES - 1;
  for (int i = 0; i < iteration.operands; ++i) {
    const Operand& operand = iteration.operand[i];
    fits &= extent_of(iteration, operand) / unit_of(operand, items) < 2 * KL_EXT_INDICES;
  }
  return fits;
}

// Whether byte offsets and the number of elements stay within 32 bits.
inline bool fits_strided_indices(const Iteration& iteration) {
  bool fits = numel_of(iteration) < KL_EXT_INDICES;
  for (int i = 0; i < iteration.operands; ++i) {
    fits &= extent_of(iteration, iteration.operand[i]) < KL_EXT_INDICES;
  }
  return fits;
}

} // namespace kl_ext::cuda
