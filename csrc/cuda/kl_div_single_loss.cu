#include "elementwise.cuh"

namespace kl_ext::cuda::kernels {

void kl_div_single_loss(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  run<Forward<math::SingleLoss>>(iteration, bounds, stream);
}

} // namespace kl_ext::cuda::kernels
