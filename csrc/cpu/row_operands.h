// Tensors as rows of contiguous numbers: a contiguous tensor is a single row, halves of a tensor have rows with gaps between,
// and a tensor that is broadcast along the first dimensions is one row that all share.
#pragma once

#include <optional>

#include "block.h"

namespace kl_ext::cpu {

// Shorter rows with gaps between are better gathered in buffers.
constexpr int64_t kShortestRow = 16;

// A shape as rows: its last dimensions, from `dim` on, make up a row.
struct Shape {
  // The whole tensor as one row.
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

// The first dimension from which on a tensor is contiguous.
inline size_t first_contiguous_dim(const at::Tensor& tensor) {
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

// The first dimension from which on a tensor is expanded from single numbers; its rank if it is not.
inline size_t first_expanded_dim(const at::Tensor& tensor) {
  size_t first = tensor.dim();
  for (size_t d = tensor.dim(); d-- > 0 && (tensor.stride(d) == 0 || tensor.size(d) == 1);) {
    first = tensor.size(d) == 1 ? first : d;
  }
  return first;
}

// The distance in numbers between the beginnings of a tensor's rows, if it is the same throughout.
inline std::optional<int64_t> row_stride_of(const at::Tensor& tensor, const Shape& shape) {
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

// If a contiguous tensor has the last dimensions of a shape and is broadcast along the others: the first dimension it has.
inline std::optional<size_t> first_shared_dim(const at::Tensor& tensor, at::IntArrayRef shape) {
  at::IntArrayRef sizes = tensor.sizes();
  while (!sizes.empty() && sizes.front() == 1) {
    sizes = sizes.slice(1);
  }
  const size_t first = shape.size() - sizes.size();
  const bool is_shared = tensor.sizes() != shape && tensor.is_contiguous() && shape.slice(first) == sizes;
  return is_shared ? std::optional(first) : std::nullopt;
}

// The rows of several tensors: their common shape, and the place of each tensor's rows.
class Rows {
 public:
  // A row consists of the dimensions from `first` on, or of fewer.
  explicit Rows(NamedTensors arguments, size_t first = 0)
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

  // Adds an operand of contiguous numbers, whose place may be given later.
  void add_contiguous(const void* data = nullptr) {
    pointers_[count_] = const_cast<void*>(data);
    strides_[count_++] = shape_.columns * element_size();
  }

  // Adds the last operand: weights of `size` bytes each, in the shape of the rows, at their own place or in a buffer.
  void add_weights(int64_t size) {
    pointers_[count_] = nullptr;
    strides_[count_++] = shape_.columns * size;
  }

  void place(int operand, void* data) { pointers_[operand] = data; }

  // Adds an operand. Rows that overlap, or lie in memory in another order, make this object invalid.
  void add(const at::Tensor& tensor, const void* data) {
    if (tensor.is_contiguous()) {
      return add_contiguous(data);
    }
    const auto stride = first_contiguous_dim(tensor) <= shape_.dim ? row_stride_of(tensor, shape_) : std::nullopt;
    is_valid_ &= stride && (shape_.rows == 1 || *stride >= shape_.columns);
    pointers_[count_] = const_cast<void*>(data);
    strides_[count_++] = stride.value_or(0) * element_size();
  }

  // Adds an operand with one row that all share.
  void add_shared(const void* row) {
    pointers_[count_] = const_cast<void*>(row);
    strides_[count_++] = 0;
  }

  // Adds the tensors that this object was constructed with.
  void add_arguments() {
    for (const auto& argument : arguments_) {
      const void* const data = argument.tensor.const_data_ptr();
      shape_.dim == 0 ? add_contiguous(data) : add(argument.tensor, data);
    }
  }

  // Whether all tensors have such rows.
  explicit operator bool() const { return is_valid_; }

  at::ScalarType dtype() const { return dtype_; }

  const Shape& shape() const { return shape_; }

  int64_t numel() const { return shape_.rows * shape_.columns; }

  // All rows of all operands.
  Block block() const { return {pointers_.data(), strides_.data(), shape_.columns, shape_.rows}; }

  // block() with another place for the last operand. pointers: room for all operands.
  Block block_with_last(void** pointers, const void* last) const {
    std::copy_n(pointers_.begin(), count_, pointers);
    pointers[count_ - 1] = const_cast<void*>(last);
    return {pointers, strides_.data(), shape_.columns, shape_.rows};
  }

  // Calls run(block, first_row) for the numbers from begin to end: up to most_rows whole rows at a time, or part of one row.
  template <class Run>
  void for_range(int64_t begin, int64_t end, int64_t most_rows, const Run& run) const {
    while (begin < end) {
      const int64_t row = shape_.rows == 1 ? 0 : begin / shape_.columns;
      const int64_t column = begin - row * shape_.columns;
      const int64_t whole = shape_.rows == 1 || column > 0 ? 1 : (end - begin) / shape_.columns;
      const int64_t rows = std::clamp<int64_t>(whole, 1, most_rows);
      const int64_t columns = std::min(shape_.columns - column, end - begin);
      void* pointers[kMaxOperands];
      run(Block{find(row, column, pointers), strides_.data(), columns, rows}, row);
      begin += columns * rows;
    }
  }

  // Calls run(block) for `rows` whole rows from `row` on, restricted to some of their columns.
  template <class Run>
  void for_part(int64_t row, int64_t rows, int64_t column, int64_t columns, const Run& run) const {
    void* pointers[kMaxOperands];
    run(Block{find(row, column, pointers), strides_.data(), columns, rows});
  }

 private:
  void* const* find(int64_t row, int64_t column, void** pointers) const {
    for (int i = 0; i < count_; ++i) {
      pointers[i] = static_cast<char*>(pointers_[i]) + row * strides_[i] + column * element_size();
    }
    return pointers;
  }

  int64_t element_size() const { return static_cast<int64_t>(c10::elementSize(dtype_)); }

  NamedTensors arguments_;
  at::ScalarType dtype_;
  Shape shape_;
  bool is_valid_ = true;
  int count_ = 0;
  std::array<void*, kMaxOperands> pointers_;
  std::array<int64_t, kMaxOperands> strides_;
};

} // namespace kl_ext::cpu
