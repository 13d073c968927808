// The interface of the CPU kernels, compiled once per instruction set: plain loops over rows of contiguous numbers. The caller
// takes care of shapes, buffers and threads. Neither this header nor the includes of kernels.cpp include torch: the linker
// would merge an inline function that two instruction sets share.
#pragma once

#include <cstdint>

#include "../math/formulas.h"

namespace kl_ext::cpu {

// The dtypes of tensors (bool is for weights only), and those of the arithmetic.
enum Storage { kFloat16, kBFloat16, kFloat32, kFloat64, kStorages, kBool = kStorages, kReadable };
enum Arithmetic { kSingle, kDouble, kArithmetics };

using Settings = math::Settings<double>;

// A matrix of numbers in memory: strides in bytes, either may be zero or negative.
struct Tile {
  std::int64_t columns;
  std::int64_t rows;
  std::int64_t column_stride;
  std::int64_t row_stride;
};

// Rows of contiguous numbers in several operands: the start of each operand's first row, and the bytes from one row to the
// next, which may be zero or negative.
struct Block {
  void* const* pointers;
  const std::int64_t* row_strides;
  std::int64_t columns;
  std::int64_t rows;
};

// Operands: the result, then the inputs, all of one storage. Kernels given q (GivenQ of math/gaussian.h) have one more input.
// Weighted ones have the weight last, which is bool for masked ones.
using ForwardKernel = void (*)(const Block& block, Settings settings);
// Operands: the gradients, one for each input; grad_output; the inputs.
using BackwardKernel = void (*)(const Block& block, Settings settings);
// A backward with one grad_output for all terms, as a number. Operands: the gradients; the inputs.
using BackwardOfOne = void (*)(const Block& block, double grad_output, Settings settings);
// BackwardOfOne for a q that the rows share. Operands: the gradients of p; the inputs. The gradients of q are added to lanes,
// [lanes, columns] each: one row to each lane in turn.
using BackwardToLanes = void (*)(const Block& block, void* lanes_of_mu, void* lanes_of_log_var, int lanes, double grad_output,
                                 Settings settings);
// Copy between a tile of any storage and contiguous numbers of the arithmetic type; Store rounds to nearest even.
using Load = void (*)(void* contiguous, const void* strided, const Tile& tile);
using Store = void (*)(void* strided, const void* contiguous, const Tile& tile);

// For sums in the order of math/summation.h. All numbers are contiguous and of the arithmetic type, but for SumChunks' inputs.
// lanes: [64, columns].
using AddToLanes = void (*)(void* lanes, const void* terms, int first, std::int64_t rows, std::int64_t columns);
using FoldLanes = void (*)(void* lanes, int in_use, std::int64_t columns);
// AddToLanes with terms that are computed from inputs. lanes: [64]; term i goes to lane (first + i) % 64.
using Accumulate = void (*)(void* lanes, const void* const* inputs, int first, std::int64_t numel, Settings settings);
// Writes to partials[..] the sums of the chunks of terms begin to end: 1024 terms each, the last may be shorter. begin is the
// start of a chunk. Operands: the inputs.
using SumChunks = void (*)(void* partials, const Block& block, std::int64_t begin, std::int64_t end, Settings settings);
// SumChunks where every row is a sum of its own, with its own chunks: partials[rows, chunks of a row].
using SumRowChunks = SumChunks;
// sums[row] from the terms of each row, at most 1024.
using SumRows = void (*)(void* sums, const void* terms, std::int64_t rows, std::int64_t columns);
// out[i] from log_var_q[i], both contiguous, for the kernels that are given q.
using PrepareQ = void (*)(void* out, const void* log_var_q, std::int64_t numel, Settings settings);
// numbers[i] /= divisor.
using Divide = void (*)(void* numbers, std::int64_t numel, std::int64_t divisor);

// The kernels of one formula, [wide] or by range. Null where there is none: weighted terms have none for half types and one
// grad_output, formulas with a single range none for the narrow one, those with nothing that depends on q alone none given q, and
// a sum of bools, which are weights, has none.
struct FormulaKernels {
  ForwardKernel forward[2][kStorages];
  BackwardKernel backward[2][kStorages];
  BackwardOfOne backward_of_one[2][kStorages];
  Accumulate accumulate[2][kArithmetics];
  SumChunks sum_chunks[2][kReadable];
  SumRowChunks sum_row_chunks[2][kReadable];
  // In the narrow range.
  ForwardKernel forward_given_q[kArithmetics];
  BackwardKernel backward_given_q[kArithmetics];
  BackwardToLanes backward_to_lanes[kArithmetics];
  Accumulate accumulate_given_q[kArithmetics];
  SumChunks sum_chunks_given_q[kArithmetics];
  SumRowChunks sum_row_chunks_given_q[kArithmetics];
  PrepareQ prepare_q[kArithmetics]; // of the forward pass
  PrepareQ prepare_q_of_backward[kArithmetics];
};

struct Kernels {
  FormulaKernels formulas[math::Formulas::kCount + 1]; // kFormula of math/formulas.h
  FormulaKernels weighted[math::Formulas::kCount];
  FormulaKernels masked[math::Formulas::kCount]; // the sums by rows, where the weights are bools
  Load load[kReadable][kArithmetics];
  Store store[kStorages][kArithmetics];
  AddToLanes add_to_lanes[kArithmetics];
  FoldLanes fold_lanes[kArithmetics];
  SumRows sum_rows[kArithmetics];
  Divide divide[kArithmetics];
};

namespace DEFAULT {
extern const Kernels kernels;
}
namespace AVX2 {
extern const Kernels kernels;
}
namespace AVX512 {
extern const Kernels kernels;
}

} // namespace kl_ext::cpu
