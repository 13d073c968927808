#include "elementwise.cuh"

namespace kl_ext::cuda::kernels {

void gaussian_kl_div(const Iteration& iteration, Bounds bounds, CUstream_st* stream) {
  run<Forward<math::Divergence>>(iteration, bounds, stream);
}

} // namespace kl_ext::cuda::kernels
