#include "rows.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <memory>

#include "../math/summation.h"
#include "../memory.h"
#include "parallel.h"
#include "partials.h"
#include "row_operands.h"
#include "sums_over_rows.h"
#include "weights.h"

namespace kl_ext::cpu {
namespace {

using math::kChunk;

// If every row has its own grad_output, a kernel is called for each row; rows shorter than this are better gathered in buffers.
constexpr int64_t kShortestRowOfOne = 64;

// The dimension where the rows begin that share a q of [D] or [1, D]; nothing if none do or the kernels cannot use it.
std::optional<size_t> first_dim_sharing_q(const Terms& terms, at::IntArrayRef shape) {
  const NamedTensors inputs = terms.operands.slice(0, terms.inputs());
  const Arithmetic arithmetic = arithmetic_of(inputs);
  if (kernels().formulas[terms.formula].prepare_q[arithmetic] == nullptr || is_wide(terms.settings, arithmetic)) {
    return std::nullopt;
  }
  for (const auto& input : inputs) {
    if (storage_of(input.tensor.scalar_type()) != storage_of(arithmetic)) {
      return std::nullopt;
    }
  }
  const auto first = first_shared_dim(inputs[2].tensor, shape);
  const bool is_shared = first && first == first_shared_dim(inputs[3].tensor, shape) && inputs[0].tensor.sizes() == shape;
  return is_shared ? first : std::nullopt;
}

// Adds q's operands for all rows and what is prepared from q, and returns the latter, which the caller has to keep.
std::unique_ptr<char[]> add_q(Rows& rows, const Terms& terms, PrepareQ prepare) {
  const at::Tensor& mu = terms.operands[2].tensor;
  const void* const log_var = terms.operands[3].tensor.const_data_ptr();
  auto prepared = std::make_unique_for_overwrite<char[]>(mu.nbytes());
  prepare(prepared.get(), log_var, mu.numel(), terms.settings);
  rows.add_shared(mu.const_data_ptr());
  rows.add_shared(log_var);
  rows.add_shared(prepared.get());
  return prepared;
}

// Calls the kernel for as many terms at a time as have their weights in one buffer. The buffer is the last operand of the rows,
// unless the weights can be read in place.
template <class FirstTerm>
void sum_weighted_chunks(SumChunks kernel, char* partials, const Rows& rows, const Settings& settings, const Weights& weights,
                         int64_t size, int64_t begin, int64_t end, const FirstTerm& first_term) {
  constexpr int64_t kTerms = 4 * kChunk;
  alignas(64) char buffer[kTerms * sizeof(double)];
  Weights::Loaded loaded;
  void* pointers[kMaxOperands];
  if (const void* const all = weights.contiguous()) {
    kernel(partials + begin * size, rows.block_with_last(pointers, all), first_term(begin), first_term(end), settings);
    return;
  }
  for (int64_t partial = begin; partial < end;) {
    const int64_t first = first_term(partial);
    int64_t next = partial + 1;
    while (next < end && first_term(next + 1) - first <= kTerms) {
      ++next;
    }
    weights.load(buffer, first, first_term(next) - first, loaded);
    // Where the weight of the very first term would be.
    const auto start = reinterpret_cast<std::uintptr_t>(buffer) - static_cast<std::uintptr_t>(first * weights.size());
    const Block block = rows.block_with_last(pointers, reinterpret_cast<const void*>(start));
    kernel(partials + partial * size, block, first, first_term(next), settings);
    partial = next;
  }
}

// The sum of all rows, or of each row. shape: of the terms.
at::Tensor sum_chunks(SumChunks kernel, const Rows& rows, const Terms& terms_of, Arithmetic arithmetic, at::ScalarType result,
                      at::IntArrayRef shape, const Reduction& reduction) {
  const auto weights = terms_of.is_weighted
                           ? std::optional<Weights>(std::in_place, terms_of.operands.back().tensor, shape, arithmetic)
                           : std::nullopt;
  const auto kept = reduction.kept_shape(shape);
  const int64_t size = size_of(arithmetic);
  const int64_t sums = c10::multiply_integers(kept);
  const int64_t terms = rows.numel() / sums;         // of each sum
  const int64_t chunks = ceil_divide(terms, kChunk); // of each sum

  constexpr int64_t kFew = 16;
  alignas(64) char few[kFew * sizeof(double)] = {};
  const auto many = sums * chunks > kFew ? std::make_unique_for_overwrite<char[]>(sums * chunks * size) : nullptr;
  char* const partials = many ? many.get() : few; // [sums, chunks]
  const auto first_term = [&](int64_t partial) { return partial / chunks * terms + partial % chunks * kChunk; };
  const int64_t grain = at::internal::GRAIN_SIZE / std::clamp<int64_t>(terms, 1, kChunk);
  parallel_for(0, sums * chunks, grain, [&](int64_t begin, int64_t end) {
    if (weights) {
      sum_weighted_chunks(kernel, partials, rows, terms_of.settings, *weights, size, begin, end, first_term);
    } else {
      kernel(partials + begin * size, rows.block(), first_term(begin), first_term(end), terms_of.settings);
    }
  });

  at::Tensor out(at::detail::empty_cpu(kept, result));
  char* const data = static_cast<char*>(out.mutable_data_ptr());
  const auto element_size = static_cast<int64_t>(out.element_size());
  const auto write = [&](int64_t sum, char* from, int64_t count) {
    if (reduction.divides) {
      kernels().divide[arithmetic](from, count, reduction.divisor(shape));
    }
    kernels().store[storage_of(result)][arithmetic](data + sum * element_size, from, Tile{count, 1, element_size, 0});
  };
  if (chunks <= 1) {
    write(0, partials, sums);
    return out;
  }
  parallel_for(0, sums, ceil_divide(at::internal::GRAIN_SIZE, chunks), [&](int64_t begin, int64_t end) {
    for (int64_t sum = begin; sum < end; ++sum) {
      char* const of_sum = partials + sum * chunks * size;
      finish_sum(of_sum, chunks, arithmetic);
      write(sum, of_sum, 1);
    }
  });
  return out;
}

} // namespace

std::optional<at::Tensor> forward_by_rows(const Terms& terms, at::ScalarType result) {
  if (terms.is_weighted) {
    return std::nullopt;
  }
  Rows rows(terms.operands);
  if (!rows || rows.dtype() != result) {
    return std::nullopt;
  }
  rows.add_contiguous();
  rows.add_arguments();
  if (!rows) {
    return std::nullopt;
  }
  const at::Tensor out = allocate(rows.shape().sizes, at::dtype(result));
  rows.place(0, out.mutable_data_ptr());
  const ForwardKernel kernel =
      kernels_of(terms).forward[is_wide(terms.settings, arithmetic_of(terms.operands))][storage_of(result)];
  parallel_for(0, rows.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    rows.for_range(begin, end, rows.shape().rows, [&](const Block& block, int64_t) { kernel(block, terms.settings); });
  });
  return out;
}

std::optional<at::Tensor> sum_by_rows(const Terms& terms, at::ScalarType result, at::IntArrayRef shape,
                                      const Reduction& reduction) {
  const NamedTensors inputs = terms.operands.slice(0, terms.inputs());
  const Arithmetic arithmetic = arithmetic_of(terms.operands, result);
  const bool wide = is_wide(terms.settings, arithmetic);
  const bool is_masked = terms.is_weighted && terms.operands.back().tensor.scalar_type() == at::kBool;
  const FormulaKernels& of_formula = is_masked ? kernels().masked[terms.formula] : kernels_of(terms);
  const auto first_reduced = std::find(reduction.reduced.begin(), reduction.reduced.end(), true);
  const size_t kept = first_reduced - reduction.reduced.begin();
  const bool are_last = std::find(first_reduced, reduction.reduced.end(), false) == reduction.reduced.end();
  if (of_formula.sum_chunks[wide][kFloat32] == nullptr || arithmetic != arithmetic_of(inputs) || !are_last ||
      (kept > 0 && c10::multiply_integers(shape) == 0)) {
    return std::nullopt;
  }
  if (Rows rows(inputs, kept); rows && rows.shape().sizes == shape) {
    rows.add_arguments();
    if (!rows || (kept > 0 && rows.shape().dim != kept)) {
      return std::nullopt;
    }
    const Storage storage = storage_of(rows.dtype());
    const SumChunks kernel = (kept > 0 ? of_formula.sum_row_chunks : of_formula.sum_chunks)[wide][storage];
    if (kernel == nullptr) {
      return std::nullopt;
    }
    if (terms.is_weighted) {
      rows.add_weights(Weights::size_of(terms.operands.back().tensor, arithmetic));
    }
    return sum_chunks(kernel, rows, terms, arithmetic, result, shape, reduction);
  }
  const auto first = first_dim_sharing_q(terms, shape);
  if (!first) {
    return std::nullopt;
  }
  Rows rows(inputs.slice(0, 2), *first);
  rows.add_arguments();
  if (!rows || rows.shape().dim != *first || (kept > 0 && kept != *first)) {
    return std::nullopt;
  }
  const auto prepared = add_q(rows, terms, kernels().formulas[terms.formula].prepare_q[arithmetic]);
  if (terms.is_weighted) {
    rows.add_weights(Weights::size_of(terms.operands.back().tensor, arithmetic));
  }
  const auto& kernel = kept > 0 ? of_formula.sum_row_chunks_given_q : of_formula.sum_chunks_given_q;
  return sum_chunks(kernel[arithmetic], rows, terms, arithmetic, result, shape, reduction);
}

bool backward_by_rows(const Terms& terms, const at::Tensor& grad_output, const Gradients& gradients) {
  const NamedTensors inputs = terms.operands;
  const Arithmetic arithmetic = arithmetic_of(inputs);
  if (terms.is_weighted || arithmetic != arithmetic_of(inputs, grad_output.scalar_type()) || grad_output.numel() == 0) {
    return false;
  }
  // If grad_output is expanded from single numbers, it is passed as a number and is not an operand.
  const size_t expanded = first_expanded_dim(grad_output);
  const bool is_expanded = expanded < static_cast<size_t>(grad_output.dim());
  Rows rows(inputs, is_expanded ? expanded : 0);
  if (!rows || grad_output.sizes() != rows.shape().sizes || !(is_expanded || grad_output.scalar_type() == rows.dtype())) {
    return false;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    rows.add(gradients[i], gradients[i].mutable_data_ptr());
  }
  if (!is_expanded) {
    rows.add(grad_output, grad_output.const_data_ptr());
  }
  rows.add_arguments();
  const auto grad_stride = rows && is_expanded ? row_stride_of(grad_output, rows.shape()) : 0;
  if (!rows || !grad_stride || (is_expanded && rows.shape().columns < kShortestRowOfOne)) {
    return false;
  }
  const bool wide = is_wide(terms.settings, arithmetic);
  const Storage storage = storage_of(rows.dtype());
  const BackwardKernel of_each = kernels_of(terms).backward[wide][storage];
  const BackwardOfOne of_one = kernels_of(terms).backward_of_one[wide][storage];
  const Load read = kernels().load[storage_of(grad_output.scalar_type())][kDouble];
  const auto* const grad = static_cast<const char*>(grad_output.const_data_ptr());
  const int64_t grad_bytes = *grad_stride * static_cast<int64_t>(grad_output.element_size());
  const int64_t most_rows = is_expanded ? 1 : rows.shape().rows;
  parallel_for(0, rows.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    rows.for_range(begin, end, most_rows, [&](const Block& block, int64_t row) {
      if (is_expanded) {
        double one = 0;
        read(&one, grad + row * grad_bytes, Tile{1, 1, 0, 0});
        of_one(block, one, terms.settings);
      } else {
        of_each(block, terms.settings);
      }
    });
  });
  return true;
}

bool backward_of_one_by_rows(const Terms& terms, double grad_output, const Gradients& gradients, at::IntArrayRef shape) {
  const NamedTensors inputs = terms.operands;
  const Arithmetic arithmetic = arithmetic_of(inputs);
  if (terms.is_weighted) {
    return false;
  }
  if (Rows rows(inputs); rows && rows.shape().sizes == shape) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      rows.add(gradients[i], gradients[i].mutable_data_ptr());
    }
    rows.add_arguments();
    if (!rows) {
      return false;
    }
    const BackwardOfOne kernel =
        kernels_of(terms).backward_of_one[is_wide(terms.settings, arithmetic)][storage_of(rows.dtype())];
    parallel_for(0, rows.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
      rows.for_range(begin, end, rows.shape().rows,
                     [&](const Block& block, int64_t) { kernel(block, grad_output, terms.settings); });
    });
    return true;
  }
  const auto first = first_dim_sharing_q(terms, shape);
  if (!first || !gradients[2].is_contiguous() || !gradients[3].is_contiguous()) {
    return false;
  }
  Rows rows(inputs.slice(0, 2), *first);
  for (size_t i = 0; i < 2; ++i) {
    rows.add(gradients[i], gradients[i].mutable_data_ptr());
  }
  rows.add_arguments();
  if (!rows || rows.shape().dim != *first || rows.numel() == 0) {
    return false;
  }
  const auto prepared = add_q(rows, terms, kernels_of(terms).prepare_q_of_backward[arithmetic]);
  SumsOverRows of_q(rows, arithmetic);
  of_q.run(kernels_of(terms).backward_to_lanes[arithmetic], grad_output, terms.settings);
  of_q.finish({gradients[2].mutable_data_ptr(), gradients[3].mutable_data_ptr()});
  return true;
}

} // namespace kl_ext::cpu
