#include "elementwise.cuh"

namespace kl_ext::cuda::kernels {

void kl_div_pair_loss_backward(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  run<Backward<math::PairLoss>>(iteration, bounds, stream);
}

} // namespace kl_ext::cuda::kernels
