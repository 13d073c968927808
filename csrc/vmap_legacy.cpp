// Batching for is_grads_batched, functional.jacobian(vectorize=True) and gradcheck. They use torch's first vmap, which has its
// own dispatch key. The rules for torch.func.vmap are in kl_ext/_vmap.py.
#include <ATen/ExpandUtils.h>
#include <ATen/LegacyVmapTransforms.h>

#include "plan.h"
#include "reduction.h"
#include "signature.h"

namespace kl_ext {
namespace {

struct LegacyBatching {
  // Returns a gradient for each example, also of an input that all examples share.
  static Gradients backward(const at::Tensor& grad_output, const Call& call, const Mask& mask) {
    // Batch dimensions in front, expanded to the whole batch, which costs no memory.
    std::vector<at::Tensor> logical{grad_output};
    for (const auto& [name, tensor] : call.tensors) {
      logical.push_back(tensor);
    }
    const auto views = at::MultiBatchVmapTransform::logicalToPhysical(logical);
    const int64_t batch_dims = views[0].numBatchDims();
    const at::DimVector shape = broadcast_shape(call.inputs());
    const Reduction how = parse_reduction(call.op->backward_name, call.reduction, call.dim, static_cast<int64_t>(shape.size()));
    at::Tensor grad = views[0].tensor();
    at::DimVector dims; // the reduced dimensions, counted with the batch dimensions
    for (size_t dim = 0; dim < how.reduced.size(); ++dim) {
      if (how.reduced[dim]) {
        dims.push_back(static_cast<int64_t>(dim) + batch_dims);
      }
    }
    const bool is_single = !how.is_none && shape.empty(); // one term per example: add a dimension of size 1
    if (is_single) {
      dims.push_back(batch_dims);
    }
    if (how.by_first) {
      grad = quotient(grad.to(arithmetic_type(call.tensors, grad.scalar_type())), how.divisor(at::IntArrayRef(shape)));
    }

    // Insert ones after the batch dimensions, so that the logical ones broadcast from the right.
    const size_t rank = batch_dims + (how.is_none ? grad.dim() - batch_dims
                                      : is_single ? 1
                                                  : static_cast<int64_t>(shape.size()));
    std::vector<at::Tensor> aligned;
    for (size_t i = 1; i < views.size(); ++i) {
      at::DimVector sizes(views[i].tensor().sizes());
      sizes.insert(sizes.begin() + batch_dims, rank - sizes.size(), 1);
      aligned.push_back(views[i].tensor().reshape(sizes));
    }
    Call physical(*call.op);
    for (size_t i = 0; i < aligned.size(); ++i) {
      physical.tensors.push_back({call.tensors[i].name, aligned[i]});
    }
    physical.is_given = call.is_given;
    physical.has_weight = call.has_weight;
    physical.clamp_min = call.clamp_min;
    physical.clamp_max = call.clamp_max;
    physical.reduction = how.by_first ? "sum" : call.reduction;
    physical.dim = dims.empty() ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(dims);
    physical.keepdim = call.keepdim && !is_single;
    Gradients gradients = call.op->backward(grad, physical, mask);
    for (size_t i = 0; i < call.inputs().size(); ++i) {
      if (gradients[i].defined()) {
        const at::Tensor gradient = gradients[i].reshape(views[i + 1].tensor().sizes());
        gradients[i] = views[0].getPhysicalToLogicalMap().apply(gradient);
      }
    }
    return gradients;
  }
};

TORCH_LIBRARY_IMPL(kl_ext, Batched, m) { register_layer<LegacyBatching>(m); }

} // namespace
} // namespace kl_ext
