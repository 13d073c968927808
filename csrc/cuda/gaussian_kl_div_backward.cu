#include "elementwise.cuh"

namespace kl_ext::cuda::kernels {

void gaussian_kl_div_backward(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  run<Backward<math::Divergence>>(iteration, bounds, stream);
}

} // namespace kl_ext::cuda::kernels
