// The weights of consecutive terms, a few chunks at a time: read in place, whatever their dtype and broadcasting. Bools stay
// bools for the masked kernels; all others are converted to the arithmetic type.
#pragma once

#include <cstring>

#include "block.h"

namespace kl_ext::cpu {

inline void load_bytes(void* contiguous, const void* strided, const Tile& tile) {
  char* to = static_cast<char*>(contiguous);
  for (int64_t row = 0; row < tile.rows; ++row, to += tile.columns) {
    const char* from = static_cast<const char*>(strided) + row * tile.row_stride;
    if (tile.column_stride == 1) {
      std::memcpy(to, from, tile.columns);
    } else if (tile.column_stride == 0) {
      std::memset(to, *from, tile.columns);
    } else {
      for (int64_t i = 0; i < tile.columns; ++i) {
        to[i] = from[i * tile.column_stride];
      }
    }
  }
}

class Weights {
 public:
  // The bytes of each weight, as the kernels read it.
  static int64_t size_of(const at::Tensor& weight, Arithmetic arithmetic) {
    return weight.scalar_type() == at::kBool ? 1 : cpu::size_of(arithmetic);
  }

  // shape: of the terms.
  Weights(const at::Tensor& weight, at::IntArrayRef shape, Arithmetic arithmetic)
      : data_(static_cast<const char*>(weight.const_data_ptr())),
        size_(size_of(weight, arithmetic)),
        is_direct_(weight.scalar_type() == at::kBool || storage_of(weight.scalar_type()) == storage_of(arithmetic)),
        load_(weight.scalar_type() == at::kBool ? load_bytes : kernels().load[storage_of(weight.scalar_type())][arithmetic]) {
    const at::Tensor expanded = weight.expand(shape);
    for (int64_t dim = expanded.dim(); dim-- > 0;) {
      const Axis axis{shape[dim], expanded.stride(dim) * static_cast<int64_t>(weight.element_size())};
      if (!axes_.empty() && axis.stride == axes_.back().stride * axes_.back().size) {
        axes_.back().size *= axis.size;
      } else if (axis.size != 1) {
        axes_.push_back(axis);
      }
    }
    if (axes_.empty()) {
      axes_.push_back({1, 0});
    }
  }

  int64_t size() const { return size_; }

  // The weights in place, if they are contiguous and of the type that the kernels read; else null.
  const void* contiguous() const { return axes_.size() == 1 && axes_[0].stride == size_ && is_direct_ ? data_ : nullptr; }

  // What a buffer currently holds.
  struct Loaded {
    const char* from = nullptr;
    Tile tile{};
  };

  // Loads the weights of `count` terms from `first` on, contiguously. loaded: what the buffer held before.
  void load(char* to, int64_t first, int64_t count, Loaded& loaded) const {
    bool is_first = true;
    while (count > 0) {
      const char* from = data_;
      int64_t rank = first;
      int64_t coordinates[2] = {};
      for (size_t i = 0; i < axes_.size(); ++i) {
        const int64_t coordinate = rank % axes_[i].size;
        rank /= axes_[i].size;
        from += coordinate * axes_[i].stride;
        if (i < 2) {
          coordinates[i] = coordinate;
        }
      }
      Tile tile{std::min(axes_[0].size - coordinates[0], count), 1, axes_[0].stride, 0};
      if (tile.columns == axes_[0].size && axes_.size() > 1) { // whole rows
        tile.rows = std::min(axes_[1].size - coordinates[1], count / tile.columns);
        tile.row_stride = axes_[1].stride;
      }
      const int64_t numel = tile.columns * tile.rows;
      const bool repeats = tile.row_stride == 0 && (tile.columns == axes_[0].size || tile.column_stride == 0);
      const bool is_there =
          is_first && repeats && from == loaded.from && tile.columns == loaded.tile.columns && tile.rows <= loaded.tile.rows;
      if (!is_there) {
        load_tile(to, from, tile);
        loaded = is_first && repeats ? Loaded{from, tile} : Loaded{};
      }
      is_first = false;
      to += numel * size_;
      first += numel;
      count -= numel;
    }
  }

 private:
  // Copies a row that repeats, which takes less time than reading it again.
  void load_tile(char* to, const char* from, const Tile& tile) const {
    const bool is_one_row = tile.row_stride == 0;
    load_(to, from, is_one_row ? Tile{tile.columns, 1, tile.column_stride, 0} : tile);
    const int64_t bytes = tile.columns * tile.rows * size_;
    for (int64_t done = tile.columns * size_; is_one_row && done < bytes; done *= 2) {
      std::memcpy(to + done, to, std::min(done, bytes - done));
    }
  }

  // Dimensions that are walked as one; the last come first.
  struct Axis {
    int64_t size;
    int64_t stride; // in bytes
  };

  const char* data_;
  int64_t size_;
  bool is_direct_;
  Load load_;
  c10::SmallVector<Axis, 4> axes_;
};

} // namespace kl_ext::cpu
