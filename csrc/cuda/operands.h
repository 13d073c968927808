// Tensors as the operands of the kernels.
#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "../checks.h"
#include "kernels.h"
#include "sum_layout.h"

namespace kl_ext::cuda {

using LaunchSum = void (*)(const Summation&, const Settings&, const SumResults&, void* scratch, CUstream_st*);

inline Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return kFloat16;
    case at::kBFloat16:
      return kBFloat16;
    case at::kFloat:
      return kFloat32;
    case at::kBool:
      return kBool;
    default:
      return kFloat64;
  }
}

// A 0-dim CPU tensor on the device. Its value is passed as a kernel argument: there is no copy to wait for.
inline at::Tensor on_device(const at::Tensor& tensor, at::Device device) {
  return tensor.is_cpu() ? at::empty({}, tensor.options().device(device)).fill_(tensor.item()) : tensor;
}

// The arguments with every 0-dim CPU tensor replaced by one on the device.
class OnDevice {
 public:
  OnDevice(NamedTensors arguments, at::Device device) {
    tensors_.reserve(arguments.size()); // arguments_ refers to them
    for (const auto& [name, tensor] : arguments) {
      tensors_.push_back(on_device(tensor, device));
      arguments_.push_back({name, tensors_.back()});
    }
  }

  OnDevice(const OnDevice&) = delete;

  operator NamedTensors() const { return arguments_; }

 private:
  c10::SmallVector<at::Tensor, 5> tensors_;
  c10::SmallVector<NamedTensor, 5> arguments_;
};

// Operand i of the result is operand operands[i] of the iterator, or a gradient that is not wanted if that is negative.
inline Iteration to_iteration(const at::TensorIterator& iterator, c10::ArrayRef<int> operands) {
  Iteration iteration;
  iteration.ndim = std::max(iterator.ndim(), 1);
  iteration.operands = static_cast<int>(operands.size());
  iteration.sizes[0] = 1;
  std::copy(iterator.shape().begin(), iterator.shape().end(), iteration.sizes);
  for (size_t i = 0; i < operands.size(); ++i) {
    if (operands[i] >= 0) {
      Operand& operand = iteration.operand[i];
      operand.data = static_cast<char*>(iterator.data_ptr(operands[i]));
      operand.dtype = storage_of(iterator.dtype(operands[i]));
      const auto strides = iterator.strides(operands[i]);
      std::copy(strides.begin(), strides.end(), operand.strides);
      if (iterator.numel() == 1) {
        operand.strides[0] = size_of(operand.dtype); // whatever the stride was: a single number is contiguous
      }
    }
  }
  return iteration;
}

// Terms of the given shape, to be summed over the flagged dimensions. Operands are added in the order of kernels.h.
class Sum {
 public:
  Sum(at::IntArrayRef shape, c10::ArrayRef<bool> reduced, at::ScalarType arithmetic) : shape_(shape), arithmetic_(arithmetic) {
    Iteration& terms = summation_.terms;
    terms.ndim = static_cast<int>(shape.size());
    for (int dim = 0; dim < terms.ndim; ++dim) {
      terms.sizes[dim] = shape[terms.ndim - 1 - dim];
      summation_.reduced[dim] = reduced[terms.ndim - 1 - dim];
      (summation_.reduced[dim] ? count_ : sums_) *= terms.sizes[dim];
    }
  }

  // Adds an output whose sums go to a contiguous tensor of the kept coordinates.
  void add_sum(const at::Tensor& result) {
    const int output = summation_.terms.operands++;
    summation_.summed[output] = true;
    summation_.terms.operand[output].dtype = storage_of(arithmetic_);
    const size_t slot = tensors_.size();
    results_.data[slot] = result.mutable_data_ptr();
    results_.dtype[slot] = storage_of(result.scalar_type());
    tensors_.push_back(result);
  }

  // Adds an elementwise output. If the tensor is undefined, a gradient that is not wanted, or not in this pass.
  void add_output(const at::Tensor& tensor, at::ScalarType dtype) {
    if (tensor.defined()) {
      tensor.mutable_data_ptr(); // materialises a lazily copied tensor
    }
    add(tensor, dtype);
  }

  void add(const at::Tensor& tensor, at::ScalarType dtype) {
    Iteration& terms = summation_.terms;
    Operand& operand = terms.operand[terms.operands++];
    operand.dtype = storage_of(dtype);
    if (tensor.defined()) {
      operand.data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
      const at::Tensor expanded = tensor.expand(shape_);
      for (int dim = 0; dim < terms.ndim; ++dim) {
        operand.strides[dim] = expanded.stride(terms.ndim - 1 - dim) * static_cast<int64_t>(tensor.element_size());
      }
    }
  }

  // Launches the sum; the sums are divided by the divisor.
  void run(LaunchSum launch, const Settings& settings, int64_t divisor, at::Device device) {
    if (count_ == 0) {
      for (const auto& result : tensors_) {
        result.fill_(0.0 / static_cast<double>(divisor));
      }
    } else if (sums_ > 0) {
      TORCH_CHECK(lay_out(summation_).terms.ndim <= kMaxSumDims, "kl_ext: expected at most ", kMaxSumDims,
                  " dimensions that do not merge, in sums on CUDA devices, got ", shape_);
      TORCH_CHECK(count_ <= kMaxTerms, "kl_ext: expected at most ", kMaxTerms, " terms to a sum on CUDA devices, got ", count_);
      summation_.divisor = divisor;
      const at::Tensor scratch = at::empty({scratch_numel(summation_)}, at::device(device).dtype(arithmetic_));
      launch(summation_, settings, results_, scratch.data_ptr(), c10::cuda::getCurrentCUDAStream());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

 private:
  Summation summation_;
  at::IntArrayRef shape_;
  at::ScalarType arithmetic_;
  SumResults results_{};
  c10::SmallVector<at::Tensor, kMaxOutputs> tensors_; // for the results
  int64_t count_ = 1;                                 // terms of a sum
  int64_t sums_ = 1;
};

} // namespace kl_ext::cuda
