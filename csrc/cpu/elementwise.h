// Elementwise iteration on the CPU: TensorIterator walks the tensors in parallel, and each thread processes blocks of
// contiguous numbers. An operand that is not contiguous or not of the arithmetic type passes through a buffer that stays in the
// first-level cache, block by block: no input is ever copied whole.
#pragma once

#include <ATen/TensorIterator.h>
#include <c10/util/FunctionRef.h>

#include "block.h"

namespace kl_ext::cpu {

// Computes a block: the operands, and what is prepared from q, or null.
using Compute = c10::function_ref<void(void* const* pointers, const void* prepared_q, int64_t numel)>;

// Calls compute for block after block, with pointers in the order of the iterator's operands. A block holds at most block_numel
// numbers, unless every operand is direct and `whole_rows` allows it.
void for_each_block(at::TensorIterator& iterator, Arithmetic arithmetic, bool whole_rows, const GivenQ& given, Compute compute);

} // namespace kl_ext::cpu
