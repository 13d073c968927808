// The operators on CUDA devices, as torch sees them: checks, allocation and the current stream; kernels.h does the rest.
// Nothing here waits for the device, but for the gradient of an input that is on the CPU.
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "../backend.h"
#include "operands.h"

namespace kl_ext::cuda {
namespace {

using Launch = void (*)(const Iteration&, Bounds, CUstream_st*);

struct Loss {
  Launch forward;
  LaunchSum forward_sum;
  Launch backward;
  LaunchSum backward_sum;
};

constexpr Loss kSingleLoss{kernels::kl_div_single_loss, kernels::kl_div_single_loss_sum, kernels::kl_div_single_loss_backward,
                           kernels::kl_div_single_loss_backward_sum};
constexpr Loss kPairLoss{kernels::kl_div_pair_loss, nullptr, kernels::kl_div_pair_loss_backward,
                         kernels::kl_div_pair_loss_backward_sum};
constexpr Loss kDivergence{kernels::gaussian_kl_div, kernels::gaussian_kl_div_sum, kernels::gaussian_kl_div_backward,
                           kernels::gaussian_kl_div_backward_sum};

void run(Launch launch, const at::TensorIterator& iterator, c10::ArrayRef<int> operands, Bounds bounds) {
  if (iterator.numel() > 0) {
    launch(to_iteration(iterator, operands), bounds, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

at::Tensor forward(const Loss& loss, Arguments inputs, Bounds bounds, at::ScalarType result) {
  const at::Device device = device_of(inputs);
  const c10::cuda::CUDAGuard guard(device);
  const OnDevice moved(inputs, device);
  const auto iterator = plan_forward(moved, result, device);
  std::array<int, kMaxInputs + 1> operands;
  std::iota(operands.begin(), operands.end(), 0);
  run(loss.forward, iterator, c10::ArrayRef<int>(operands.data(), inputs.size() + 1), bounds);
  return iterator.output();
}

at::Tensor forward_sum(const Loss& loss, Arguments inputs, Bounds bounds, at::ScalarType result, at::IntArrayRef shape,
                       const Reduction& reduction) {
  const at::Device device = device_of(inputs);
  const c10::cuda::CUDAGuard guard(device);
  const OnDevice moved(inputs, device);
  Sum sum(shape, reduction.reduced, arithmetic_type(inputs, result));
  const at::Tensor sums = at::empty(reduction.kept_shape(shape), at::device(device).dtype(result));
  sum.add_sum(sums);
  for (const auto& input : Arguments(moved)) {
    sum.add(input.tensor, input.tensor.scalar_type());
  }
  const int64_t divisor = reduction.divides ? reduction.divisor(shape) : 1;
  sum.run(loss.forward_sum, bounds, divisor, device);
  return sums;
}

// The gradients of broadcast inputs are summed in the pass that computes them: one pass for each way of being broadcast, of
// which there is hardly ever more than one; what is elementwise is written in the first.
void backward_sums(const Loss& loss, Arguments arguments, Bounds bounds, const Gradients& gradients, at::Device device) {
  const auto shape = arguments[0].tensor.sizes();
  const size_t inputs = arguments.size() - 1;
  const at::ScalarType arithmetic = arithmetic_type(arguments);
  std::array<bool, kMaxInputs> done{};
  for (size_t leader = 0; leader < inputs; ++leader) {
    const auto reduced = broadcast_dims(arguments[leader + 1].tensor.sizes(), shape);
    const bool is_elementwise = std::find(reduced.begin(), reduced.end(), true) == reduced.end();
    if (!gradients[leader].defined() || done[leader] || is_elementwise) {
      continue;
    }
    Sum sum(shape, reduced, arithmetic);
    c10::SmallVector<std::pair<at::Tensor, at::Tensor>, kMaxInputs> copies; // to gradients that are not contiguous
    for (size_t i = 0; i < inputs; ++i) {
      const bool is_wanted = gradients[i].defined() && !done[i];
      if (is_wanted && gradients[i].sizes() == shape) {
        sum.add_output(gradients[i], gradients[i].scalar_type());
        done[i] = true;
      } else if (is_wanted && broadcast_dims(gradients[i].sizes(), shape) == reduced) {
        const at::Tensor sums =
            gradients[i].is_contiguous() ? gradients[i] : at::empty(gradients[i].sizes(), gradients[i].options());
        sum.add_sum(sums);
        if (!sums.is_same(gradients[i])) {
          copies.emplace_back(gradients[i], sums);
        }
        done[i] = true;
      } else {
        sum.add_output({}, arguments[i + 1].tensor.scalar_type());
      }
    }
    for (const auto& argument : arguments) {
      sum.add(argument.tensor, argument.tensor.scalar_type());
    }
    sum.run(loss.backward_sum, bounds, /*divisor=*/1, device);
    for (const auto& [gradient, sums] : copies) {
      gradient.copy_(sums);
    }
  }
}

// arguments: grad_output in the shape of the terms, then the inputs.
void backward(const Loss& loss, Arguments arguments, Bounds bounds, const Gradients& gradients) {
  const auto shape = arguments[0].tensor.sizes();
  const size_t inputs = arguments.size() - 1;
  const at::Device device = device_of(arguments);
  const c10::cuda::CUDAGuard guard(device);
  const OnDevice copies(arguments, device);
  const Arguments moved(copies);
  Gradients computed;
  std::array<int, 2 * kMaxInputs + 1> operands;
  int wanted = 0;
  bool any_broadcast = false;
  for (size_t i = 0; i < inputs; ++i) {
    operands[i] = gradients[i].defined() ? wanted++ : -1;
    if (gradients[i].defined()) {
      computed[i] = gradients[i].is_cpu() ? at::empty_like(moved[i + 1].tensor) : gradients[i];
      any_broadcast |= computed[i].sizes() != shape;
    }
  }
  if (any_broadcast) {
    backward_sums(loss, moved, bounds, computed, device);
  } else if (wanted > 0) {
    std::iota(operands.begin() + inputs, operands.begin() + 2 * inputs + 1, wanted);
    run(loss.backward, plan_backward(moved, at::TensorList(computed.data(), inputs)),
        c10::ArrayRef<int>(operands.data(), 2 * inputs + 1), bounds);
  }
  for (size_t i = 0; i < inputs; ++i) {
    if (gradients[i].defined() && !gradients[i].is_same(computed[i])) {
      gradients[i].copy_(computed[i]);
    }
  }
}

// The gradient of each term's sum, in the arithmetic type.
at::Tensor divided(const at::Tensor& grad_output, int64_t divisor, at::ScalarType arithmetic) {
  const at::Tensor source = grad_output.contiguous();
  at::Tensor grad = at::empty(source.sizes(), source.options().dtype(arithmetic));
  if (grad.numel() > 0) {
    const auto divide = [&](auto* quotients) {
      kernels::divide(source.const_data_ptr(), storage_of(source.scalar_type()), grad.numel(), divisor, quotients,
                      c10::cuda::getCurrentCUDAStream());
    };
    arithmetic == at::kDouble ? divide(grad.mutable_data_ptr<double>()) : divide(grad.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return grad;
}

// The gradient of a sum is that of its terms, divided where it is a mean.
void backward_sum(const Loss& loss, const at::Tensor& grad_output, Arguments inputs, Bounds bounds, const Gradients& gradients,
                  at::IntArrayRef shape, const Reduction& reduction) {
  c10::SmallVector<Argument, kMaxInputs + 1> given{{"grad_output", grad_output}};
  given.append(inputs.begin(), inputs.end());
  const c10::cuda::CUDAGuard guard(device_of(given));
  at::Tensor grad = on_device(grad_output, guard.current_device());
  if (reduction.divides) {
    grad = divided(grad, reduction.divisor(shape), arithmetic_type(given));
  }
  grad = reduction.expand(grad, shape);
  c10::SmallVector<Argument, kMaxInputs + 1> arguments{{"grad_output", grad}};
  arguments.append(inputs.begin(), inputs.end());
  backward(loss, arguments, bounds, gradients);
}

struct Backend {
  using Loss = cuda::Loss;
  static constexpr Loss kSingleLoss = cuda::kSingleLoss;
  static constexpr Loss kPairLoss = cuda::kPairLoss;
  static constexpr Loss kDivergence = cuda::kDivergence;
  static constexpr auto forward = cuda::forward;
  static constexpr auto forward_sum = cuda::forward_sum;
  static constexpr auto backward = cuda::backward;
  static constexpr auto backward_sum = cuda::backward_sum;
};

TORCH_LIBRARY_IMPL(kl_ext, CUDA, m) { Operators<Backend>::register_in(m); }

} // namespace
} // namespace kl_ext::cuda
