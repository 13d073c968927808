// The interface of the CPU kernels, compiled once per instruction set: plain loops over rows of contiguous numbers. Shapes,
// buffers and threads are the caller's. Neither this header nor what kernels.cpp includes knows torch: an inline function that
// two instruction sets share would be merged by the linker.
#pragma once

#include <cstdint>

namespace kl_ext::cpu {

// The dtypes of tensors, and those of the arithmetic.
enum Storage { kFloat16, kBFloat16, kFloat32, kFloat64, kStorages };
enum Arithmetic { kSingle, kDouble, kArithmetics };

// kDivergence is KL(p||q); kPairLoss the documented 2 KL(p||q) + 1/2; kSingleLoss KL(p||N(0, 1)).
enum Loss { kSingleLoss, kPairLoss, kDivergence, kLosses };

struct Bounds {
  double low;
  double high;
};

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

// Operands: the result; the inputs. All of one storage. Given q (PairGivenQ of math/gaussian.h), one more input.
using Forward = void (*)(const Block& block, Bounds bounds);
// Operands: the gradients, one for each input; grad_output; the inputs.
using Backward = void (*)(const Block& block, Bounds bounds);
// The same from one grad_output for all, which is no operand.
using BackwardOfOne = void (*)(const Block& block, double grad_output, Bounds bounds);
// The same given a q that the rows share. Operands: the gradients of p; the inputs. Those of q are added to the lanes of each,
// [lanes, columns], a row to a lane, and after the last to the first again.
using BackwardToLanes = void (*)(const Block& block, void* lanes_of_mu, void* lanes_of_log_var, int lanes, double grad_output,
                                 Bounds bounds);
// Between a tile of any storage and contiguous numbers of the arithmetic type; Store rounds to nearest even.
using Load = void (*)(void* contiguous, const void* strided, const Tile& tile);
using Store = void (*)(void* strided, const void* contiguous, const Tile& tile);

// For sums in the order of math/summation.h, all of contiguous numbers of the arithmetic type but for the inputs of SumChunks.
// lanes: [64, columns].
using AddToLanes = void (*)(void* lanes, const void* terms, int first, std::int64_t rows, std::int64_t columns);
using FoldLanes = void (*)(void* lanes, int in_use, std::int64_t columns);
// The same with terms computed on the way: lanes: [64]; term i goes to lane (first + i) % 64.
using Accumulate = void (*)(void* lanes, const void* const* inputs, int first, std::int64_t numel, Bounds bounds);
// partials[..] from the chunks of 1024 terms, the last of which may be shorter, from term number begin, which begins one, to end.
// Operands: the inputs.
using SumChunks = void (*)(void* partials, const Block& block, std::int64_t begin, std::int64_t end, Bounds bounds);
// The same where every row is a sum of its own, with chunks of its own: partials[rows, chunks of a row].
using SumRowChunks = SumChunks;
// sums[row] from the at most 1024 terms of each row.
using SumRows = void (*)(void* sums, const void* terms, std::int64_t rows, std::int64_t columns);
// out[i] from the log_var_q[i] of contiguous numbers, for the kernels that are given q.
using PrepareQ = void (*)(void* out, const void* log_var_q, std::int64_t numel, Bounds bounds);
// numbers[i] /= divisor.
using Divide = void (*)(void* numbers, std::int64_t numel, std::int64_t divisor);

struct Kernels {
  Forward forward[kLosses][2][kStorages]; // [..][wide][..]
  Backward backward[kLosses][2][kStorages];
  BackwardOfOne backward_of_one[kLosses][2][kStorages];
  Accumulate accumulate[kLosses][2][kArithmetics];
  SumChunks sum_chunks[kLosses][2][kStorages];
  SumRowChunks sum_row_chunks[kLosses][2][kStorages];
  // Narrow ranges only; none for kSingleLoss.
  Forward forward_given_q[kLosses][kArithmetics];
  Backward backward_given_q[kLosses][kArithmetics];
  BackwardToLanes backward_to_lanes[kLosses][kArithmetics];
  Accumulate accumulate_given_q[kLosses][kArithmetics];
  SumChunks sum_chunks_given_q[kLosses][kArithmetics];
  SumRowChunks sum_row_chunks_given_q[kLosses][kArithmetics];
  PrepareQ prepare_q[kLosses][kArithmetics]; // of the forward pass
  PrepareQ prepare_q_of_backward[kLosses][kArithmetics];
  Load load[kStorages][kArithmetics];
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
