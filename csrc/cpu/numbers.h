// The loops over plain numbers: between tiles of tensors and buffers, and sums of terms that are already computed.
#pragma once

#include "../math/half.h"
#include "../math/summation.h"
#include "groups.h"
#include "kernels.h"

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

template <class S, class T>
void load(void* contiguous, const void* strided, const Tile& tile) {
  T* out = static_cast<T*>(contiguous);
  for (std::int64_t row = 0; row < tile.rows; ++row, out += tile.columns) {
    const char* in = static_cast<const char*>(strided) + row * tile.row_stride;
    if (tile.column_stride == sizeof(S)) {
      const S* values = reinterpret_cast<const S*>(in);
      KL_EXT_LOOP
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        out[i] = static_cast<T>(math::widen(values[i]));
      }
    } else if (tile.column_stride == 0) {
      const T one = static_cast<T>(math::widen(*reinterpret_cast<const S*>(in)));
      KL_EXT_LOOP
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        out[i] = one;
      }
    } else {
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        out[i] = static_cast<T>(math::widen(*reinterpret_cast<const S*>(in + i * tile.column_stride)));
      }
    }
  }
}

template <class S, class T>
void store(void* strided, const void* contiguous, const Tile& tile) {
  const T* in = static_cast<const T*>(contiguous);
  for (std::int64_t row = 0; row < tile.rows; ++row, in += tile.columns) {
    char* out = static_cast<char*>(strided) + row * tile.row_stride;
    if (tile.column_stride == sizeof(S)) {
      S* values = reinterpret_cast<S*>(out);
      KL_EXT_LOOP
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        math::narrow(values[i], in[i]);
      }
    } else {
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        math::narrow(*reinterpret_cast<S*>(out + i * tile.column_stride), in[i]);
      }
    }
  }
}

template <class T>
void add_to_lanes(void* lanes, const void* terms, int first, std::int64_t rows, std::int64_t columns) {
  math::add_to_lanes(static_cast<T*>(lanes), static_cast<const T*>(terms), first, rows, columns);
}

template <class T>
void fold_lanes(void* lanes, int in_use, std::int64_t columns) {
  if (in_use == math::kLanes && columns == 1) {
    return math::fold_lanes(static_cast<T*>(lanes), math::kLanes, 1); // unrolled
  }
  math::fold_lanes(static_cast<T*>(lanes), in_use, columns);
}

// For rows of at most kInUse terms, one term to a lane.
template <int kInUse, class T>
void sum_short_rows(T* sums, const T* row, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i, row += columns) {
    T lanes[kInUse] = {};
    for (std::int64_t lane = 0; lane < (columns == kInUse ? kInUse : columns); ++lane) {
      lanes[lane] += row[lane];
    }
    math::fold_lanes(lanes, kInUse, 1);
    sums[i] = lanes[0];
  }
}

template <class T>
void sum_rows(void* sums, const void* terms, std::int64_t rows, std::int64_t columns) {
  T* out = static_cast<T*>(sums);
  const T* row = static_cast<const T*>(terms);
  switch (math::lanes_in_use(columns)) {
    case 1:
      return sum_short_rows<1>(out, row, rows, columns);
    case 2:
      return sum_short_rows<2>(out, row, rows, columns);
    case 4:
      return sum_short_rows<4>(out, row, rows, columns);
    case 8:
      return sum_short_rows<8>(out, row, rows, columns);
    case 16:
      return sum_short_rows<16>(out, row, rows, columns);
    case 32:
      return sum_short_rows<32>(out, row, rows, columns);
  }
  for (std::int64_t i = 0; i < rows; ++i, row += columns) {
    T lanes[math::kLanes] = {};
    math::add_to_lanes(lanes, row, 0, columns, 1);
    math::fold_lanes(lanes, math::kLanes, 1);
    out[i] = lanes[0];
  }
}

template <class T>
void divide(void* numbers, std::int64_t numel, std::int64_t divisor) {
  for (std::int64_t i = 0; i < numel; ++i) {
    static_cast<T*>(numbers)[i] /= static_cast<T>(divisor);
  }
}

} // namespace
} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
