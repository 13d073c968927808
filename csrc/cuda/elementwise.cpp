// The losses and their gradients on CUDA devices, as torch sees them: checks, allocation and the current stream; kernels.h does
// the rest. Nothing here waits for the device, but for the gradient of an input that is on the CPU.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "../plan.h"
#include "kernels.h"

namespace kl_ext::cuda {
namespace {

using Launch = void (*)(const Iteration&, Bounds, CUstream_st*);

Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return kFloat16;
    case at::kBFloat16:
      return kBFloat16;
    case at::kFloat:
      return kFloat32;
    default:
      return kFloat64;
  }
}

// The CUDA device that check_devices found all arguments on, except for 0-dim CPU tensors.
at::Device device_of(Arguments arguments) {
  for (const auto& argument : arguments) {
    if (argument.tensor.is_cuda()) {
      return argument.tensor.device();
    }
  }
  TORCH_INTERNAL_ASSERT(false, "the CUDA kernel called without a CUDA tensor");
}

// The arguments with every 0-dim CPU tensor replaced by one on the device. Its value goes there as an argument of a kernel:
// there is no copy to wait for.
class OnDevice {
 public:
  OnDevice(Arguments arguments, at::Device device) {
    tensors_.reserve(arguments.size()); // arguments_ refers to them
    for (const auto& [name, tensor] : arguments) {
      tensors_.push_back(tensor.is_cpu() ? at::empty({}, tensor.options().device(device)).fill_(tensor.item()) : tensor);
      arguments_.push_back({name, tensors_.back()});
    }
  }

  operator Arguments() const { return arguments_; }

 private:
  c10::SmallVector<at::Tensor, 5> tensors_;
  c10::SmallVector<Argument, 5> arguments_;
};

// Operand i of the result is operand operands[i] of the iterator, or a gradient not wanted where that is negative.
Iteration to_iteration(const at::TensorIterator& iterator, c10::ArrayRef<int> operands) {
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
        operand.strides[0] = size_of(operand.dtype); // whatever it was: a single number is contiguous
      }
    }
  }
  return iteration;
}

void run(Launch launch, const at::TensorIterator& iterator, c10::ArrayRef<int> operands, Bounds bounds) {
  if (iterator.numel() > 0) {
    launch(to_iteration(iterator, operands), bounds, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <size_t kInputs>
at::Tensor forward(const char* function, Launch launch, const std::array<Argument, kInputs>& inputs, Bounds bounds,
                   std::optional<at::ScalarType> dtype) {
  check_forward(function, inputs, bounds.low, bounds.high, dtype);
  const at::Device device = device_of(inputs);
  const c10::cuda::CUDAGuard guard(device);
  const auto iterator = plan_forward(OnDevice(inputs, device), dtype.value_or(result_type(inputs)), device);
  std::array<int, kInputs + 1> operands;
  std::iota(operands.begin(), operands.end(), 0);
  run(launch, iterator, operands, bounds);
  return iterator.output();
}

// arguments: grad_output, then the inputs.
template <size_t kInputs>
std::array<at::Tensor, kInputs> backward(const char* function, Launch launch,
                                         const std::array<Argument, kInputs + 1>& arguments, Bounds bounds,
                                         const std::array<bool, kInputs>& output_mask) {
  check_backward(function, arguments, bounds.low, bounds.high);
  const at::Device device = device_of(arguments);
  const c10::cuda::CUDAGuard guard(device);
  const OnDevice on_device(arguments, device);
  auto gradients = allocate_gradients<kInputs>(on_device, output_mask);
  std::array<int, 2 * kInputs + 1> operands;
  int next = 0;
  for (size_t i = 0; i < kInputs; ++i) {
    operands[i] = output_mask[i] ? next++ : -1;
  }
  if (next > 0) {
    std::iota(operands.begin() + kInputs, operands.end(), next);
    run(launch, plan_backward<kInputs>(on_device, gradients), operands, bounds);
    reduce_gradients(gradients);
  }
  for (size_t i = 0; i < kInputs; ++i) {
    if (output_mask[i] && arguments[i + 1].tensor.is_cpu()) {
      gradients.result[i] = gradients.result[i].cpu();
    }
  }
  return std::move(gradients.result);
}

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  return forward<2>("kl_div_single_loss", kernels::kl_div_single_loss, {{{"mu", mu}, {"log_var", log_var}}},
                    {clamp_min, clamp_max}, dtype);
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  return std::tuple_cat(backward<2>("kl_div_single_loss_backward", kernels::kl_div_single_loss_backward,
                                    {{{"grad_output", grad_output}, {"mu", mu}, {"log_var", log_var}}}, {clamp_min, clamp_max},
                                    output_mask));
}

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  return forward<4>("kl_div_pair_loss", kernels::kl_div_pair_loss,
                    {{{"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}}},
                    {clamp_min, clamp_max}, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  return std::tuple_cat(backward<4>(
      "kl_div_pair_loss_backward", kernels::kl_div_pair_loss_backward,
      {{{"grad_output", grad_output}, {"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}}},
      {clamp_min, clamp_max}, output_mask));
}

TORCH_LIBRARY_IMPL(kl_ext, CUDA, m) {
  m.impl("kl_div_single_loss", kl_div_single_loss);
  m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
  m.impl("kl_div_pair_loss", kl_div_pair_loss);
  m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
}

} // namespace
} // namespace kl_ext::cuda
