// What the iterations on the CPU share: the kernels of the instruction set in use, and operands read and written block by
// block.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../backend.h"
#include "kernels.h"

namespace kl_ext::cpu {

// The most operands, in the backward of a pair: four gradients, grad_output, four inputs, the weight, what is prepared from q.
constexpr int kMaxOperands = 11;
// The bytes of an operand in one block: ten of them fit the first-level cache.
constexpr int64_t kBlockBytes = 4096;
// Rows at least this long are cut into blocks one by one; shorter ones are gathered, several to a block.
constexpr int64_t kLongRow = 256;

// The kernels of the instruction set that torch itself uses.
const Kernels& kernels();

inline const FormulaKernels& kernels_of(const Terms& terms) {
  return terms.is_weighted ? kernels().weighted[terms.formula] : kernels().formulas[terms.formula];
}

inline Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return kFloat16;
    case at::kBFloat16:
      return kBFloat16;
    case at::kFloat:
      return kFloat32;
    case at::kBool:
      return kBool;
    default:
      return kFloat64;
  }
}

inline Storage storage_of(Arithmetic arithmetic) { return arithmetic == kDouble ? kFloat64 : kFloat32; }

inline Arithmetic arithmetic_of(NamedTensors arguments, at::ScalarType dtype = at::kFloat) {
  return arithmetic_type(arguments, dtype) == at::kDouble ? kDouble : kSingle;
}

inline int64_t size_of(Arithmetic arithmetic) { return arithmetic == kDouble ? sizeof(double) : sizeof(float); }

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t block_numel(Arithmetic arithmetic) { return kBlockBytes / size_of(arithmetic); }

// Whether the kernels for any clamp are needed.
bool is_wide(const Settings& settings, Arithmetic arithmetic);

// Which operand is log_var_q, for kernels that take precomputed values of q where rows share it; negative if none is.
struct GivenQ {
  int log_var_q = -1;
  PrepareQ prepare = nullptr;
  Settings settings{};
};

// The precomputed values of q, for the blocks of a thread. They are kept as long as the same log_var_q comes back.
class PreparedQ {
 public:
  explicit PreparedQ(const GivenQ& given) : given_(given) {}

  // The values for the tile of log_var_q at `data`, which is contiguous in `numbers`; null where rows do not share q.
  const void* find(const char* data, const Tile& tile, const void* numbers, bool rows_share_it) {
    if (given_.log_var_q < 0 || !rows_share_it) {
      return nullptr;
    }
    if (data != data_ || tile.columns != columns_ || tile.rows > rows_) {
      given_.prepare(buffer_, numbers, tile.columns * tile.rows, given_.settings);
      data_ = data;
      columns_ = tile.columns;
      rows_ = tile.rows;
    }
    return buffer_;
  }

 private:
  GivenQ given_;
  const char* data_ = nullptr;
  int64_t columns_ = 0;
  int64_t rows_ = 0;
  alignas(64) char buffer_[kBlockBytes];
};

// Contiguous operands as a block of one row.
inline Block contiguous(void* const* pointers, int64_t numel) {
  static constexpr std::int64_t kNoStrides[kMaxOperands] = {};
  return {pointers, kNoStrides, numel, 1};
}

// One operand of an iteration, as a thread sees it: provides each block in the arithmetic type.
class Operand {
 public:
  // buffer: kBlockBytes bytes.
  Operand(at::ScalarType dtype, Arithmetic arithmetic, bool is_output, char* buffer)
      : buffer_(buffer),
        element_size_(static_cast<int64_t>(c10::elementSize(dtype))),
        is_arithmetic_(storage_of(dtype) == storage_of(arithmetic)),
        is_output_(is_output),
        load_(kernels().load[storage_of(dtype)][arithmetic]),
        store_(is_output ? kernels().store[storage_of(dtype)][arithmetic] : nullptr) {}

  // Whether a row needs no buffer.
  bool is_direct(int64_t column_stride) const { return is_arithmetic_ && column_stride == element_size_; }

  void* begin_block(char* data, const Tile& tile) {
    is_buffered_ = !is_direct(tile.column_stride) || (tile.rows > 1 && tile.row_stride != tile.columns * element_size_);
    if (!is_buffered_) {
      return data;
    }
    if (!is_output_ && !is_loaded(data, tile)) {
      load_(buffer_, data, tile);
      loaded_data_ = data;
      loaded_tile_ = tile;
    }
    return buffer_;
  }

  void end_block(char* data, const Tile& tile) {
    if (is_buffered_) {
      store_(data, buffer_, tile);
    }
  }

 private:
  // A broadcast operand comes back to the same place block after block.
  bool is_loaded(const char* data, const Tile& tile) const {
    const bool repeats = tile.rows == 1 || tile.row_stride == 0;
    const bool is_prefix = tile.rows == 1 ? tile.columns <= loaded_tile_.columns
                                          : tile.columns == loaded_tile_.columns && tile.rows <= loaded_tile_.rows;
    return data == loaded_data_ && tile.column_stride == loaded_tile_.column_stride && repeats && is_prefix;
  }

  char* buffer_;
  int64_t element_size_;
  bool is_arithmetic_;
  bool is_output_;
  bool is_buffered_ = false;
  Load load_;
  Store store_;
  const char* loaded_data_ = nullptr;
  Tile loaded_tile_{};
};

} // namespace kl_ext::cpu
