#include "partials.h"

#include <memory>

#include "../math/summation.h"

namespace kl_ext::cpu {

using math::kChunk;
using math::kLanes;

void finish_sum(char* partials, int64_t chunks, Arithmetic arithmetic) {
  const int64_t size = size_of(arithmetic);
  for (int64_t left = chunks; left > 1; left = ceil_divide(left, kChunk)) {
    for (int64_t start = 0; start < left; start += kChunk) {
      const int64_t count = std::min<int64_t>(kChunk, left - start);
      kernels().sum_rows[arithmetic](partials + start / kChunk * size, partials + start * size, 1, count);
    }
  }
}

void finish_sums(char* partials, int64_t chunks, int64_t columns, Arithmetic arithmetic) {
  const int64_t size = size_of(arithmetic);
  const auto lanes = std::make_unique_for_overwrite<char[]>(kLanes * std::min(kColumns, columns) * size);
  for (int64_t left = chunks; left > 1; left = ceil_divide(left, kChunk)) {
    for (int64_t first = 0; first < left; first += kChunk) {
      const int64_t rows = std::min<int64_t>(kChunk, left - first);
      const int in_use = math::lanes_in_use(rows);
      for (int64_t column = 0; column < columns; column += kColumns) {
        const int64_t width = std::min(kColumns, columns - column);
        std::fill_n(lanes.get(), in_use * width * size, char{0});
        for (int64_t row = 0; row < rows; ++row) {
          kernels().add_to_lanes[arithmetic](lanes.get(), partials + ((first + row) * columns + column) * size,
                                             static_cast<int>(row % kLanes), 1, width);
        }
        kernels().fold_lanes[arithmetic](lanes.get(), in_use, width);
        std::copy_n(lanes.get(), width * size, partials + (first / kChunk * columns + column) * size);
      }
    }
  }
}

} // namespace kl_ext::cpu
