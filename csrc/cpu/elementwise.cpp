#include "elementwise.h"

namespace kl_ext::cpu {

void for_each_block(at::TensorIterator& iterator, Arithmetic arithmetic, bool whole_rows, const GivenQ& given,
                    Compute compute) {
  const int64_t block = block_numel(arithmetic);
  const int operand_count = iterator.ntensors();
  iterator.for_each([&](char** data, const int64_t* strides, int64_t columns, int64_t rows) {
    alignas(64) char buffers[kMaxOperands][kBlockBytes];
    c10::SmallVector<Operand, kMaxOperands> operands;
    PreparedQ prepared(given);
    const bool shares_q = given.log_var_q >= 0 && rows > 1 && columns <= block && strides[operand_count + given.log_var_q] == 0;
    bool all_direct = whole_rows && !shares_q;
    for (int i = 0; i < operand_count; ++i) {
      operands.emplace_back(iterator.dtype(i), arithmetic, i < iterator.noutputs(), buffers[i]);
      all_direct &= operands[i].is_direct(strides[i]);
    }
    const bool gather = columns < kLongRow && rows > 1;
    const int64_t width = gather || all_direct ? columns : std::min(columns, block);
    const int64_t height = gather ? block / columns : 1;
    for (int64_t row = 0; row < rows; row += height) {
      for (int64_t column = 0; column < columns; column += width) {
        Tile tile{std::min(width, columns - column), std::min(height, rows - row), 0, 0};
        void* pointers[kMaxOperands];
        const void* prepared_q = nullptr;
        for (int i = 0; i < operand_count; ++i) {
          tile.column_stride = strides[i];
          tile.row_stride = strides[operand_count + i];
          char* const start = data[i] + row * tile.row_stride + column * tile.column_stride;
          pointers[i] = operands[i].begin_block(start, tile);
          if (i == given.log_var_q) {
            prepared_q = prepared.find(start, tile, pointers[i], shares_q);
          }
        }
        compute(pointers, prepared_q, tile.columns * tile.rows);
        for (int i = 0; i < iterator.noutputs(); ++i) {
          tile.column_stride = strides[i];
          tile.row_stride = strides[operand_count + i];
          operands[i].end_block(data[i] + row * tile.row_stride + column * tile.column_stride, tile);
        }
      }
    }
  });
}

} // namespace kl_ext::cpu
