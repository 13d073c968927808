// The interface of the CUDA kernels: an iteration over operands in device memory, handed over by the host code that knows
// torch. Neither this header nor any file compiled by nvcc includes torch.
#pragma once

#include "../math/platform.h"

struct CUstream_st;

namespace kl_ext::cuda {

// The dtypes of tensors.
enum Storage : std::int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

KL_EXT_INLINE constexpr std::int64_t size_of(Storage dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

constexpr int kMaxDims = 64;    // torch's own limit
constexpr int kMaxOperands = 9; // of the pair loss's backward

// A tensor as the iteration walks it: strides in bytes, any of them may be zero.
struct Operand {
  char* data = nullptr; // null for a gradient that is not wanted
  Storage dtype = kFloat32;
  std::int64_t strides[kMaxDims] = {};
};

// At least one dimension, the fastest first; no size is 0. Operands in the order of the kernels below.
struct Iteration {
  int ndim = 0;
  int operands = 0;
  std::int64_t sizes[kMaxDims] = {};
  Operand operand[kMaxOperands];
};

struct Bounds {
  double low;
  double high;
};

namespace kernels {

// Operands: the result; the inputs. Arithmetic is in float64 if an operand is float64, else in float32; each result is rounded
// once. All of it is put on the stream: nothing waits.
void kl_div_single_loss(const Iteration& iteration, Bounds bounds, CUstream_st* stream);
void kl_div_pair_loss(const Iteration& iteration, Bounds bounds, CUstream_st* stream);

// Operands: the gradients, one for each input; grad_output; the inputs.
void kl_div_single_loss_backward(const Iteration& iteration, Bounds bounds, CUstream_st* stream);
void kl_div_pair_loss_backward(const Iteration& iteration, Bounds bounds, CUstream_st* stream);

} // namespace kernels

} // namespace kl_ext::cuda
