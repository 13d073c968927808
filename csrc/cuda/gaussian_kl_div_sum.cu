#include "sum.cuh"

namespace kl_ext::cuda::kernels {

void gaussian_kl_div_sum(const Summation& summation, Bounds bounds, const SumResults& results, void* scratch,
                         CUstream_st* stream) {
  run_sum<Forward<math::Divergence>>(summation, bounds, results, scratch, stream);
}

} // namespace kl_ext::cuda::kernels
