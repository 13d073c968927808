// Terms [rows, columns] and their sums, for lab.py: built once for each variant of csrc/cuda/tuning.h.
#include "cuda/sum.cuh"

#include "cuda/finish.cu"

using namespace kl_ext;

namespace {

constexpr cuda::Settings kSettings{-30, 20, 1, 0};

// Strides in bytes along columns and rows.
cuda::Operand operand_of(void* data, cuda::Storage dtype, std::int64_t column, std::int64_t row) {
  cuda::Operand operand;
  operand.data = static_cast<char*>(data);
  operand.dtype = dtype;
  operand.strides[0] = column;
  operand.strides[1] = row;
  return operand;
}

} // namespace

// The numbers of scratch that the sum takes; it is launched if scratch is given. dtype: of everything but the sums, which are
// float32. forward: over these dimensions, of the terms of `inputs` tensors, 2 or 4; those of q are [columns] if is_prior.
// backward: the gradients of p, and those of a prior, summed over rows; data starts with the former and a single grad_output.
extern "C" std::int64_t lab_sum(bool backward, int inputs, bool is_prior, int dtype, std::int64_t rows, std::int64_t columns,
                                bool over_rows, bool over_columns, void* const* data, void* const* sums, void* scratch,
                                void* stream) {
  const auto storage = static_cast<cuda::Storage>(dtype);
  const std::int64_t size = cuda::size_of(storage);
  cuda::Summation summation;
  cuda::Iteration& terms = summation.terms;
  terms.ndim = 2;
  terms.sizes[0] = columns;
  terms.sizes[1] = rows;
  summation.reduced[0] = over_columns;
  summation.reduced[1] = over_rows;
  const auto add = [&](const cuda::Operand& operand) { terms.operand[terms.operands++] = operand; };
  const auto add_sum = [&] {
    summation.summed[terms.operands] = true;
    add(operand_of(nullptr, cuda::kFloat32, 0, 0));
  };
  if (backward) {
    add(operand_of(*data++, storage, size, size * columns));
    add(operand_of(*data++, storage, size, size * columns));
    add_sum();
    add_sum();
    add(operand_of(*data++, storage, 0, 0));
  } else {
    add_sum();
  }
  for (int i = 0; i < inputs; ++i) {
    add(operand_of(*data++, storage, size, is_prior && i >= 2 ? 0 : size * columns));
  }
  cuda::SumResults results{};
  for (int i = 0; i < (backward ? 2 : 1); ++i) {
    results.data[i] = sums[i];
    results.dtype[i] = cuda::kFloat32;
  }
  if (scratch != nullptr) {
    const auto launch = backward      ? cuda::kernels::backward_sum<math::Divergence>
                        : inputs == 2 ? cuda::kernels::forward_sum<math::StandardDivergence>
                                      : cuda::kernels::forward_sum<math::Divergence>;
    launch(summation, kSettings, results, scratch, static_cast<CUstream_st*>(stream));
  }
  return cuda::scratch_numel(summation);
}

// Terms of as many inputs, or all their gradients, of contiguous tensors: outputs, grad_output if backward, inputs. Takes no
// scratch, and is launched if some is given all the same.
extern "C" std::int64_t lab_each(bool backward, int inputs, int dtype, std::int64_t rows, std::int64_t columns,
                                 void* const* data, void* scratch, void* stream) {
  const auto storage = static_cast<cuda::Storage>(dtype);
  cuda::Iteration terms;
  terms.ndim = 1;
  terms.sizes[0] = rows * columns;
  terms.operands = backward ? 2 * inputs + 1 : inputs + 1;
  for (int i = 0; i < terms.operands; ++i) {
    terms.operand[i] = operand_of(data[i], storage, cuda::size_of(storage), 0);
  }
  if (scratch != nullptr) {
    const auto launch =
        inputs == 2
            ? (backward ? cuda::kernels::backward<math::StandardDivergence> : cuda::kernels::forward<math::StandardDivergence>)
            : (backward ? cuda::kernels::backward<math::Divergence> : cuda::kernels::forward<math::Divergence>);
    launch(terms, kSettings, static_cast<CUstream_st*>(stream));
  }
  return 0;
}
