// Sums of per-element terms on the CPU, computed and summed in one pass over the operands, in the order of math/summation.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include "elementwise.h"

#include <optional>

namespace kl_ext::cpu {

// An operand over the full shape of the terms, with strides in bytes. A summed output is contiguous, in the row-major order of
// the kept coordinates; its sums are divided by `divisor`, if there is one, and then rounded.
struct SumOperand {
  enum Role { kInput, kElementwiseOutput, kSummedOutput };

  SumOperand(const at::Tensor& tensor, Role operand_role, at::IntArrayRef shape);
  SumOperand(const at::Tensor& sums, std::optional<int64_t> sums_divisor, size_t dims);

  char* data;
  at::ScalarType dtype;
  Role role;
  c10::SmallVector<int64_t, 8> strides;
  std::optional<int64_t> divisor;
};

using AddTerms = c10::function_ref<void(void* lanes, void* const* inputs, const void* prepared_q, int first, int64_t numel)>;

// Calls compute(pointers, prepared_q, numel) for blocks of all terms, with pointers in the order of the operands; for a summed
// output it writes the terms. `reduced` has a flag for each dimension of the shape.
//
// accumulate(lanes, inputs, prepared_q, first, numel), for a single sum as the only output, adds the terms to lanes as it
// computes them (kernels.h).
void sum_terms(at::IntArrayRef shape, c10::ArrayRef<bool> reduced, c10::ArrayRef<SumOperand> operands, Arithmetic arithmetic,
               const GivenQ& given, Compute compute, std::optional<AddTerms> accumulate = std::nullopt);

} // namespace kl_ext::cpu
