// The emulated kernels for tests/test_cuda_emulation.py, through ctypes.
#include "../../csrc/cuda/kernels.h"

using namespace kl_ext;

// Operands in the order of csrc/cuda/kernels.h: data, dtypes, and for each the strides of every dimension. Returns the number
// of launches and leaves up to `most` of their grids in `grids`.
extern "C" int run(int kernel, int ndim, const std::int64_t* sizes, int operands, char* const* data, const int* dtypes,
                   const std::int64_t* strides, double low, double high, std::uint32_t last_blocks, std::uint32_t* grids,
                   int most) {
  cuda::Iteration iteration;
  iteration.ndim = ndim;
  iteration.operands = operands;
  for (int dim = 0; dim < ndim; ++dim) {
    iteration.sizes[dim] = sizes[dim];
  }
  for (int i = 0; i < operands; ++i) {
    iteration.operand[i].data = data[i];
    iteration.operand[i].dtype = static_cast<cuda::Storage>(dtypes[i]);
    for (int dim = 0; dim < ndim; ++dim) {
      iteration.operand[i].strides[dim] = strides[i * ndim + dim];
    }
  }
  emulation::launched.clear();
  emulation::last_blocks = last_blocks;
  constexpr decltype(&cuda::kernels::kl_div_single_loss) kKernels[] = {
      cuda::kernels::kl_div_single_loss, cuda::kernels::kl_div_single_loss_backward, cuda::kernels::kl_div_pair_loss,
      cuda::kernels::kl_div_pair_loss_backward};
  kKernels[kernel](iteration, {low, high}, nullptr);
  const int launches = static_cast<int>(emulation::launched.size());
  for (int i = 0; i < launches && i < most; ++i) {
    grids[i] = emulation::launched[i];
  }
  return launches;
}
