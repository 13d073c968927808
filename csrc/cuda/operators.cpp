// The operators on CUDA devices: allocation and the current stream; kernels.h does the rest. Nothing here waits for the device,
// except for the gradient of an input that is on the CPU.
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <numeric>

#include "../backend.h"
#include "../signature.h"
#include "operands.h"

namespace kl_ext::cuda {
namespace {

using Launch = void (*)(const Iteration&, const Settings&, CUstream_st*);

struct Launches {
  Launch forward;
  LaunchSum forward_sum;
  Launch backward;
  LaunchSum backward_sum;
};

template <class F>
constexpr Launches kLaunchesOf = {kernels::forward<F>, kernels::forward_sum<F>, kernels::backward<F>, kernels::backward_sum<F>};

template <class... F>
const Launches& launches_of(const Terms& terms, math::FormulaList<F...>) {
  static constexpr Launches kPlain[] = {kLaunchesOf<F>..., {nullptr, kernels::forward_sum<math::Weight>, nullptr, nullptr}};
  static constexpr Launches kWeighted[] = {kLaunchesOf<math::Weighted<F>>...};
  return terms.is_weighted ? kWeighted[terms.formula] : kPlain[terms.formula];
}

const Launches& launches_of(const Terms& terms) { return launches_of(terms, math::Formulas()); }

void run(Launch launch, const at::TensorIterator& iterator, c10::ArrayRef<int> operands, const Settings& settings) {
  if (iterator.numel() > 0) {
    launch(to_iteration(iterator, operands), settings, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

at::Tensor forward(const Terms& terms, at::ScalarType result) {
  const c10::cuda::CUDAGuard guard(terms.device);
  const OnDevice moved(terms.operands, terms.device);
  const auto iterator = plan_forward(moved, result, terms.device);
  std::array<int, kMaxOperands> operands;
  std::iota(operands.begin(), operands.end(), 0);
  run(launches_of(terms).forward, iterator, c10::ArrayRef<int>(operands.data(), terms.operands.size() + 1), terms.settings);
  return iterator.output();
}

at::Tensor forward_sum(const Terms& terms, at::ScalarType result, at::IntArrayRef shape, const Reduction& reduction) {
  const c10::cuda::CUDAGuard guard(terms.device);
  const OnDevice moved(terms.operands, terms.device);
  Sum sum(shape, reduction.reduced, arithmetic_type(terms.operands, result));
  const at::Tensor sums = at::empty(reduction.kept_shape(shape), at::device(terms.device).dtype(result));
  sum.add_sum(sums);
  for (const auto& operand : NamedTensors(moved)) {
    sum.add(operand.tensor, operand.tensor.scalar_type());
  }
  const int64_t divisor = reduction.divides ? reduction.divisor(shape) : 1;
  sum.run(launches_of(terms).forward_sum, terms.settings, divisor, terms.device);
  return sums;
}

// One pass that sums some of the gradients. operands: on the device.
void run_pass(const SumPass& pass, const Terms& terms, const at::Tensor& grad_output, NamedTensors operands,
              const Gradients& gradients) {
  Sum sum(grad_output.sizes(), pass.reduced, arithmetic_type(operands, grad_output.scalar_type()));
  SumTargets targets;
  for (size_t i = 0; i < terms.inputs(); ++i) {
    switch (pass.roles[i]) {
      case SumPass::kElementwise:
        sum.add_output(gradients[i], gradients[i].scalar_type());
        break;
      case SumPass::kSummed:
        sum.add_sum(targets.add(gradients[i]));
        break;
      case SumPass::kAbsent:
        sum.add_output({}, operands[i].tensor.scalar_type());
    }
  }
  sum.add(grad_output, grad_output.scalar_type());
  for (const auto& operand : operands) {
    sum.add(operand.tensor, operand.tensor.scalar_type());
  }
  sum.run(launches_of(terms).backward_sum, terms.settings, /*divisor=*/1, terms.device);
  targets.hand_over();
}

// grad_output: in the shape of the terms.
void backward(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients) {
  const c10::cuda::CUDAGuard guard(terms.device);
  const OnDevice copies(terms.operands, terms.device);
  const NamedTensors moved(copies);
  const at::Tensor grad = on_device(grad_output, terms.device);
  Gradients computed; // on the device
  c10::SmallVector<int, kMaxOperands> operands;
  int wanted = 0;
  for (size_t i = 0; i < terms.inputs(); ++i) {
    operands.push_back(gradients[i].defined() ? wanted++ : -1);
    if (gradients[i].defined()) {
      computed[i] = gradients[i].is_cpu() ? at::empty_like(moved[i].tensor) : gradients[i];
    }
  }
  const auto passes = sum_passes(moved.slice(0, terms.inputs()), computed, grad.sizes());
  for (const SumPass& pass : passes) {
    run_pass(pass, terms, grad, moved, computed);
  }
  if (passes.empty() && wanted > 0) {
    for (size_t i = 0; i < 1 + moved.size(); ++i) {
      operands.push_back(wanted + static_cast<int>(i));
    }
    const auto iterator = plan_backward(grad, moved, at::TensorList(computed.data(), terms.inputs()));
    run(launches_of(terms).backward, iterator, operands, terms.settings);
  }
  for (size_t i = 0; i < terms.inputs(); ++i) {
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
void backward_sum(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients, at::IntArrayRef shape,
                  const Reduction& reduction) {
  const c10::cuda::CUDAGuard guard(terms.device);
  at::Tensor grad = on_device(grad_output, terms.device);
  if (reduction.divides) {
    grad = divided(grad, reduction.divisor(shape), arithmetic_type(terms.operands, grad.scalar_type()));
  }
  backward(terms, reduction.expand(grad, shape), gradients);
}

struct Backend {
  static constexpr auto forward = cuda::forward;
  static constexpr auto forward_sum = cuda::forward_sum;
  static constexpr auto backward = cuda::backward;
  static constexpr auto backward_sum = cuda::backward_sum;
};

TORCH_LIBRARY_IMPL(kl_ext, CUDA, m) { register_layer<Layer<Backend>>(m); }

} // namespace
} // namespace kl_ext::cuda
