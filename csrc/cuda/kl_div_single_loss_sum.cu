#include "sum.cuh"

namespace kl_ext::cuda::kernels {

void kl_div_single_loss_sum(const Summation& summation, Bounds bounds, void* sums, void* scratch, CUstream_st* stream) {
  run_sum<Forward<math::SingleLoss>>(summation, bounds, sums, scratch, stream);
}

} // namespace kl_ext::cuda::kernels
