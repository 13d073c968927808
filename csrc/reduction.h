// What `reduction` and `dim` mean, for the operators that take them.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <c10/core/WrapDimMinimal.h>
#include <c10/util/Exception.h>

#include <limits>
#include <string_view>

namespace kl_ext {

struct Reduction {
  c10::SmallVector<bool, 8> reduced; // for each dimension of the terms
  bool is_none = true;
  bool divides = false; // by the number of terms, or for batchmean by the first size
  bool by_first = false;

  // Whether the divisor is the sum of the weights, as it is for the mean of weighted terms.
  bool divides_by_weights(bool is_weighted) const { return is_weighted && divides && !by_first; }

  // This reduction without its division.
  Reduction sum() const {
    Reduction result = *this;
    result.divides = false;
    return result;
  }

  // With keepdim, a reduced dimension stays with size 1.
  at::DimVector kept_shape(at::IntArrayRef shape, bool keepdim = false) const {
    at::DimVector kept;
    for (size_t dim = 0; dim < reduced.size(); ++dim) {
      if (!reduced[dim] || keepdim) {
        kept.push_back(reduced[dim] ? 1 : shape[dim]);
      }
    }
    return kept;
  }

  // The elements of shape are int64_t or SymInt.
  template <class Shape>
  auto divisor(const Shape& shape) const {
    std::decay_t<decltype(shape[0])> count = 1;
    for (size_t dim = 0; dim < reduced.size(); ++dim) {
      if (reduced[dim] && (!by_first || dim == 0)) {
        count = count * shape[dim];
      }
    }
    return count;
  }

  // A reduced tensor with dimensions of size 1 where it was reduced, so that it broadcasts with the terms.
  at::Tensor unsqueeze(at::Tensor reduced_tensor) const {
    for (size_t dim = 0; dim < reduced.size(); ++dim) {
      reduced_tensor = reduced[dim] ? reduced_tensor.unsqueeze(static_cast<int64_t>(dim)) : reduced_tensor;
    }
    return reduced_tensor;
  }

  // A reduced tensor expanded to the shape of the terms: one view instead of one for each dimension.
  at::Tensor expand(const at::Tensor& reduced_tensor, at::IntArrayRef shape) const {
    at::DimVector strides;
    int64_t kept = 0;
    for (const bool is_reduced : reduced) {
      strides.push_back(is_reduced ? 0 : reduced_tensor.stride(kept++));
    }
    return reduced_tensor.as_strided(shape, strides);
  }
};

inline Reduction parse_reduction(const char* function, std::string_view reduction, at::OptionalIntArrayRef dim, int64_t rank) {
  const bool is_none = reduction == "none";
  const bool is_batchmean = reduction == "batchmean";
  TORCH_CHECK_VALUE(is_none || is_batchmean || reduction == "sum" || reduction == "mean", function,
                    ": expected reduction to be \"none\", \"sum\", \"mean\" or \"batchmean\", got \"", reduction, "\"");
  TORCH_CHECK_VALUE(!dim || !(is_none || is_batchmean), function, ": expected no dim with reduction \"", reduction, "\", got ",
                    *dim);
  TORCH_CHECK_VALUE(!is_batchmean || rank > 0, function,
                    ": expected at least one dimension for reduction \"batchmean\", got 0-dim tensors");
  Reduction result;
  result.is_none = is_none;
  result.divides = is_batchmean || reduction == "mean";
  result.by_first = is_batchmean;
  result.reduced.assign(rank, !is_none && (!dim || dim->empty()));
  bool seen = false; // for 0-dim tensors, which have one dimension to name
  for (const int64_t index : dim.value_or(at::IntArrayRef())) {
    TORCH_CHECK_INDEX(-std::max<int64_t>(rank, 1) <= index && index < std::max<int64_t>(rank, 1), function,
                      ": expected dim from ", -std::max<int64_t>(rank, 1), " to ", std::max<int64_t>(rank, 1) - 1, ", got ",
                      index);
    const int64_t wrapped = index < 0 ? index + rank : index;
    bool& reduced = rank > 0 ? result.reduced[wrapped] : seen;
    TORCH_CHECK(!reduced, function, ": expected each dim once, got ", *dim);
    reduced = true;
  }
  return result;
}

// The quotient rounded once, as in the operators. On a GPU torch divides by a number by multiplying with its reciprocal.
inline at::Tensor quotient(const at::Tensor& sum, const at::Scalar& count) {
  return sum.div(at::full({}, count, at::dtype(sum.scalar_type()).device(sum.device())));
}

// The divisor of a weighted mean: NaN where the weights add up to 0, as the mean of nothing is.
inline at::Tensor nan_for_zero(const at::Tensor& weights) {
  return at::where(weights == 0, std::numeric_limits<double>::quiet_NaN(), weights);
}

} // namespace kl_ext
