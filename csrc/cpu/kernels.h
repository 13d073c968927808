// The interface of the CPU kernels, compiled once per instruction set: plain loops over rows of contiguous numbers. Shapes,
// buffers and threads are the caller's. Neither this header nor what kernels.cpp includes knows torch: an inline function that
// two instruction sets share would be merged by the linker.
#pragma once

#include <cstdint>

#include "../math/formulas.h"

namespace kl_ext::cpu {

// The dtypes of tensors, bool only of weights; and those of the arithmetic.
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

// Rows of contiguous numbers in several operands: where the first row of each begins, and the bytes from one row to the next,
// which may be zero or negative.
struct Block {
  void* const* pointers;
  const std::int64_t* row_strides;
  std::int64_t columns;
  std::int64_t rows;
};

// Operands: the result; the inputs. All of one storage. Given q (GivenQ of math/gaussian.h), one more input; with a weight, that
// behind them, of bools for the masked ones.
using ForwardKernel = void (*)(const Block& block, Settings settings);
// Operands: the gradients, one for each input; grad_output; the inputs.
using BackwardKernel = void (*)(const Block& block, Settings settings);
// The same from one grad_output for all, which is no operand.
using BackwardOfOne = void (*)(const Block& block, double grad_output, Settings settings);
// The same given a q that the rows share. Operands: the gradients of p; the inputs. Those of q are added to the lanes of each,
// [lanes, columns], a row to a lane, and after the last to the first again.
using BackwardToLanes = void (*)(const Block& block, void* lanes_of_mu, void* lanes_of_log_var, int lanes, double grad_output,
                                 Settings settings);
// Between a tile of any storage and contiguous numbers of the arithmetic type; Store rounds to nearest even.
using Load = void (*)(void* contiguous, const void* strided, const Tile& tile);
using Store = void (*)(void* strided, const void* contiguous, const Tile& tile);

// For sums in the order of math/summation.h, all of contiguous numbers of the arithmetic type but for the inputs of SumChunks.
// lanes: [64, columns].
using AddToLanes = void (*)(void* lanes, const void* terms, int first, std::int64_t rows, std::int64_t columns);
using FoldLanes = void (*)(void* lanes, int in_use, std::int64_t columns);
// The same with terms computed on the way: lanes: [64]; term i goes to lane (first + i) % 64.
using Accumulate = void (*)(void* lanes, const void* const* inputs, int first, std::int64_t numel, Settings settings);
// partials[..] from the chunks of 1024 terms, the last of which may be shorter, from term number begin, which begins one, to end.
// Operands: the inputs.
using SumChunks = void (*)(void* partials, const Block& block, std::int64_t begin, std::int64_t end, Settings settings);
// The same where every row is a sum of its own, with chunks of its own: partials[rows, chunks of a row].
using SumRowChunks = SumChunks;
// sums[row] from the at most 1024 terms of each row.
using SumRows = void (*)(void* sums, const void* terms, std::int64_t rows, std::int64_t columns);
// out[i] from the log_var_q[i] of contiguous numbers, for the kernels that are given q.
using PrepareQ = void (*)(void* out, const void* log_var_q, std::int64_t numel, Settings settings);
// numbers[i] /= divisor.
using Divide = void (*)(void* numbers, std::int64_t numel, std::int64_t divisor);

// Of one formula, [wide] or by range. A null is a kernel that there is not: of weighted terms those for half types and for one
// gradient, those of a narrow range where a formula has but one, and those given q where nothing depends on q alone.
struct FormulaKernels {
  ForwardKernel forward[2][kStorages];
  BackwardKernel backward[2][kStorages];
  BackwardOfOne backward_of_one[2][kStorages];
  Accumulate accumulate[2][kArithmetics];
  SumChunks sum_chunks[2][kStorages];
  SumRowChunks sum_row_chunks[2][kStorages];
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
