#include "rows.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <memory>

#include "../math/summation.h"
#include "../memory.h"
#include "block.h"

namespace kl_ext::cpu {
namespace {

using math::kChunk;

// Rows that are shorter, with gaps between, are better gathered in buffers.
constexpr int64_t kShortestRow = 16;
// Likewise where every row has a gradient of its own, which is a call of a kernel for each.
constexpr int64_t kShortestRowOfOne = 64;

// The rows of a shape: its last dimensions, from the given one on, make up a row.
struct Shape {
  // One row.
  explicit Shape(const at::Tensor& tensor) : sizes(tensor.sizes()), columns(tensor.numel()) {}

  Shape(at::IntArrayRef shape, size_t first) : sizes(shape), dim(first), columns(1) {
    for (size_t d = 0; d < sizes.size(); ++d) {
      (d < dim ? rows : columns) *= sizes[d];
    }
  }

  at::IntArrayRef sizes;
  size_t dim = 0;
  int64_t rows = 1;
  int64_t columns;
};

// From where on the dimensions of a tensor are contiguous.
size_t first_contiguous_dim(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return 0;
  }
  int64_t expected = 1;
  for (size_t d = tensor.dim(); d-- > 0;) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) {
      return d + 1;
    }
    expected *= tensor.size(d);
  }
  return 0;
}

// From where on a tensor is expanded from single numbers: one that is not, from behind its last dimension on.
size_t first_expanded_dim(const at::Tensor& tensor) {
  size_t first = tensor.dim();
  for (size_t d = tensor.dim(); d-- > 0 && (tensor.stride(d) == 0 || tensor.size(d) == 1);) {
    first = tensor.size(d) == 1 ? first : d;
  }
  return first;
}

// The numbers between the beginnings of a tensor's rows, if they are the same throughout.
std::optional<int64_t> row_stride_of(const at::Tensor& tensor, const Shape& shape) {
  std::optional<int64_t> stride;
  int64_t next = 0;
  for (size_t d = shape.dim; d-- > 0;) {
    if (shape.sizes[d] == 1) {
      continue;
    }
    if (stride && tensor.stride(d) != next) {
      return std::nullopt;
    }
    stride = stride ? stride : tensor.stride(d);
    next = tensor.stride(d) * shape.sizes[d];
  }
  return stride.value_or(shape.columns);
}

// The rows of several tensors: first what they have in common, then where each has them.
class Rows {
 public:
  // Made of the dimensions from `first` on, or of fewer.
  explicit Rows(Arguments arguments, size_t first = 0)
      : arguments_(arguments), dtype_(arguments[0].tensor.scalar_type()), shape_(arguments[0].tensor) {
    for (const auto& argument : arguments) {
      is_valid_ = is_valid_ && argument.tensor.scalar_type() == dtype_ && argument.tensor.sizes() == shape_.sizes;
      if (!is_valid_) {
        return;
      }
      first = std::max(first, first_contiguous_dim(argument.tensor));
    }
    if (first > 0) {
      shape_ = Shape(shape_.sizes, first);
      is_valid_ = shape_.rows == 1 || shape_.columns >= kShortestRow;
    }
  }

  // The next operand: contiguous numbers, which may have their place later.
  void add_contiguous(const void* data = nullptr) {
    pointers_[count_] = const_cast<void*>(data);
    strides_[count_++] = shape_.columns * element_size();
  }

  void place(int operand, void* data) { pointers_[operand] = data; }

  // The next operand. Rows that overlap or lie in another order are not taken for some.
  void add(const at::Tensor& tensor, const void* data) {
    if (tensor.is_contiguous()) {
      return add_contiguous(data);
    }
    const auto stride = first_contiguous_dim(tensor) <= shape_.dim ? row_stride_of(tensor, shape_) : std::nullopt;
    is_valid_ &= stride && (shape_.rows == 1 || *stride >= shape_.columns);
    pointers_[count_] = const_cast<void*>(data);
    strides_[count_++] = stride.value_or(0) * element_size();
  }

  // The arguments that the rows were found in.
  void add_arguments() {
    for (const auto& argument : arguments_) {
      const void* const data = argument.tensor.const_data_ptr();
      shape_.dim == 0 ? add_contiguous(data) : add(argument.tensor, data);
    }
  }

  // Whether the tensors have such rows.
  explicit operator bool() const { return is_valid_; }

  at::ScalarType dtype() const { return dtype_; }

  const Shape& shape() const { return shape_; }

  int64_t numel() const { return shape_.rows * shape_.columns; }

  // All of the operands.
  Block block() const { return {pointers_.data(), strides_.data(), shape_.columns, shape_.rows}; }

  // Calls run(block, first_row) for the numbers from begin to end: for at most so many whole rows, and for parts of others.
  template <class Run>
  void for_range(int64_t begin, int64_t end, int64_t most_rows, const Run& run) const {
    while (begin < end) {
      const int64_t row = shape_.rows == 1 ? 0 : begin / shape_.columns;
      const int64_t column = begin - row * shape_.columns;
      const int64_t whole = shape_.rows == 1 || column > 0 ? 1 : (end - begin) / shape_.columns;
      const int64_t rows = std::clamp<int64_t>(whole, 1, most_rows);
      const int64_t columns = std::min(shape_.columns - column, end - begin);
      void* pointers[kMaxOperands];
      for (int i = 0; i < count_; ++i) {
        pointers[i] = static_cast<char*>(pointers_[i]) + row * strides_[i] + column * element_size();
      }
      run(Block{pointers, strides_.data(), columns, rows}, row);
      begin += columns * rows;
    }
  }

 private:
  int64_t element_size() const { return static_cast<int64_t>(c10::elementSize(dtype_)); }

  Arguments arguments_;
  at::ScalarType dtype_;
  Shape shape_;
  bool is_valid_ = true;
  int count_ = 0;
  std::array<void*, kMaxOperands> pointers_;
  std::array<int64_t, kMaxOperands> strides_;
};

// Sums partials[chunks] level after level; the sum is left in the first.
void finish(char* partials, int64_t chunks, Arithmetic arithmetic) {
  const int64_t size = size_of(arithmetic);
  for (int64_t left = chunks; left > 1; left = (left + kChunk - 1) / kChunk) {
    for (int64_t start = 0; start < left; start += kChunk) {
      const int64_t count = std::min<int64_t>(kChunk, left - start);
      kernels().sum_rows[arithmetic](partials + start / kChunk * size, partials + start * size, 1, count);
    }
  }
}

} // namespace

std::optional<at::Tensor> forward_by_rows(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result) {
  Rows rows(inputs);
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
  const Forward kernel = kernels().forward[loss][is_wide(bounds, arithmetic_of(inputs))][storage_of(result)];
  at::parallel_for(0, rows.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    rows.for_range(begin, end, rows.shape().rows, [&](const Block& block, int64_t) { kernel(block, bounds); });
  });
  return out;
}

std::optional<at::Tensor> sum_by_rows(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result,
                                      std::optional<int64_t> divisor) {
  Rows rows(inputs);
  const Arithmetic arithmetic = arithmetic_of(inputs, result);
  if (!rows || arithmetic != arithmetic_of(inputs)) {
    return std::nullopt;
  }
  rows.add_arguments();
  if (!rows) {
    return std::nullopt;
  }
  const SumChunks kernel = kernels().sum_chunks[loss][is_wide(bounds, arithmetic)][storage_of(rows.dtype())];
  const int64_t numel = rows.numel();
  const int64_t size = size_of(arithmetic);
  const int64_t chunks = (numel + kChunk - 1) / kChunk;

  constexpr int64_t kFew = 16;
  alignas(64) char few[kFew * sizeof(double)] = {};
  const auto many = chunks > kFew ? std::make_unique_for_overwrite<char[]>(chunks * size) : nullptr;
  char* const partials = many ? many.get() : few;
  at::parallel_for(0, chunks, at::internal::GRAIN_SIZE / kChunk, [&](int64_t begin, int64_t end) {
    kernel(partials + begin * size, rows.block(), begin * kChunk, std::min(end * kChunk, numel), bounds);
  });
  finish(partials, chunks, arithmetic);
  if (divisor) {
    kernels().divide[arithmetic](partials, 1, *divisor);
  }
  at::Tensor sum(at::detail::empty_cpu({}, result));
  kernels().store[storage_of(result)][arithmetic](sum.mutable_data_ptr(), partials, Tile{1, 1, 0, 0});
  return sum;
}

bool backward_by_rows(Loss loss, Arguments arguments, Bounds bounds, const Gradients& gradients) {
  const at::Tensor& grad_output = arguments[0].tensor;
  const Arguments inputs = arguments.slice(1);
  const Arithmetic arithmetic = arithmetic_of(inputs);
  if (arithmetic != arithmetic_of(arguments) || grad_output.numel() == 0) {
    return false;
  }
  // Expanded from single numbers, grad_output is no operand of the kernels.
  const size_t expanded = first_expanded_dim(grad_output);
  const bool is_expanded = expanded < static_cast<size_t>(grad_output.dim()) || grad_output.dim() == 0;
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
  if (!rows || !grad_stride || (*grad_stride != 0 && rows.shape().columns < kShortestRowOfOne)) {
    return false;
  }
  const bool wide = is_wide(bounds, arithmetic);
  const Storage storage = storage_of(rows.dtype());
  const Backward of_each = kernels().backward[loss][wide][storage];
  const BackwardOfOne of_one = kernels().backward_of_one[loss][wide][storage];
  const Load read = kernels().load[storage_of(grad_output.scalar_type())][kDouble];
  const auto* const grad = static_cast<const char*>(grad_output.const_data_ptr());
  const int64_t grad_bytes = *grad_stride * static_cast<int64_t>(grad_output.element_size());
  const int64_t most_rows = *grad_stride == 0 ? rows.shape().rows : 1;
  at::parallel_for(0, rows.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    rows.for_range(begin, end, most_rows, [&](const Block& block, int64_t row) {
      if (is_expanded) {
        double one = 0;
        read(&one, grad + row * grad_bytes, Tile{1, 1, 0, 0});
        of_one(block, one, bounds);
      } else {
        of_each(block, bounds);
      }
    });
  });
  return true;
}

} // namespace kl_ext::cpu
