// The interface of the CUDA kernels: an iteration over operands in device memory, passed by the host code that includes torch.
// Neither this header nor any file compiled by nvcc includes torch.
#pragma once

#include "../math/formulas.h"

struct CUstream_st;

namespace kl_ext::cuda {

// The dtypes of tensors; bool is for weights only.
enum Storage : std::int32_t { kFloat16, kBFloat16, kFloat32, kFloat64, kBool };

KL_EXT_INLINE constexpr std::int64_t size_of(Storage dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : dtype == kBool ? 1 : 2;
}

constexpr int kMaxDims = 64;     // torch's own limit
constexpr int kMaxOperands = 10; // of the backward of a weighted pair
constexpr int kMaxOutputs = 4;

// A tensor as the iteration walks it. Strides are in bytes; any of them may be zero.
struct Operand {
  char* data = nullptr; // null for a gradient that is not wanted
  Storage dtype = kFloat32;
  std::int64_t strides[kMaxDims] = {};
};

// At least one dimension, the fastest first; no size is 0. Operands are in the order of the kernels below.
struct Iteration {
  int ndim = 0;
  int operands = 0;
  std::int64_t sizes[kMaxDims] = {};
  Operand operand[kMaxOperands];
};

// An iteration whose outputs are summed over some dimensions, in the order of math/summation.h. That is the order of the
// logical coordinates, so the dimensions are those of the logical shape, the last first. A summed output has no data, and the
// dtype of the arithmetic.
struct Summation {
  Iteration terms;
  bool reduced[kMaxDims] = {};   // for each dimension
  bool summed[kMaxOutputs] = {}; // for each output
  std::int64_t divisor = 1;      // of the sums
};

// What a kernel leaves of a sum of many chunks: the sums of the chunks, or of lanes of chunks, 64 for each 1024 chunks.
struct Partials {
  std::int64_t count;
  bool are_lanes;
};

// Where the sums of the summed outputs go, in order: [kept coordinates], contiguous, each rounded once.
struct SumResults {
  void* data[kMaxOutputs];
  Storage dtype[kMaxOutputs];
};

using Settings = math::Settings<double>;

namespace kernels {

// For a formula F; cmake/cuda.cmake lists the formulas. Operands: the result; the inputs. Arithmetic is in float64 if an
// operand is float64, else in float32; each result is rounded once. Everything is put on the stream: nothing waits.
template <class F>
void forward(const Iteration& iteration, const Settings& settings, CUstream_st* stream);

// Operands: the gradients, one for each input that has them; grad_output; the inputs.
template <class F>
void backward(const Iteration& iteration, const Settings& settings, CUstream_st* stream);

// The sums of forward, with the same operands. scratch: as many numbers of the arithmetic type as scratch_numel (sum_layout.h)
// says. There is at least one term.
template <class F>
void forward_sum(const Summation& summation, const Settings& settings, const SumResults& results, void* scratch,
                 CUstream_st* stream);
template <class F>
void backward_sum(const Summation& summation, const Settings& settings, const SumResults& results, void* scratch,
                  CUstream_st* stream);

// Sums each column of numbers [partials.count, outputs, sums]. scratch: a number for each output and sum, for each 2^20 chunks
// or 2^16 lanes, if there are more than those.
void finish_sums(const float* numbers, Partials partials, int outputs, std::int64_t sums, std::int64_t divisor,
                 const SumResults& results, float* scratch, CUstream_st* stream);
void finish_sums(const double* numbers, Partials partials, int outputs, std::int64_t sums, std::int64_t divisor,
                 const SumResults& results, double* scratch, CUstream_st* stream);

// quotients[i] = numbers[i] / divisor, rounded as IEEE says, which torch's division by a number on CUDA is not.
void divide(const void* numbers, Storage dtype, std::int64_t numel, std::int64_t divisor, float* quotients,
            CUstream_st* stream);
void divide(const void* numbers, Storage dtype, std::int64_t numel, std::int64_t divisor, double* quotients,
            CUstream_st* stream);

} // namespace kernels

} // namespace kl_ext::cuda
