// The losses and their gradients on the CPU: TensorIterator walks the tensors, in parallel; each thread hands blocks of
// contiguous numbers to the kernels of the instruction set in use. An operand that is not contiguous numbers of the arithmetic
// type passes through a buffer that stays in the first-level cache, block by block: no input is ever copied whole.
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "../math/exponential.h"
#include "../plan.h"
#include "kernels.h"

namespace kl_ext::cpu {
namespace {

// The bytes of an operand in one block: nine of them fit the first-level cache.
constexpr int64_t kBlockBytes = 4096;
// Rows at least this long are cut into blocks one by one; shorter ones are gathered, several to a block.
constexpr int64_t kLongRow = 256;

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = [&]() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
    return capability.starts_with("AVX512") ? AVX512::kernels : capability == "AVX2" ? AVX2::kernels : DEFAULT::kernels;
  }();
  return chosen;
#else
  return DEFAULT::kernels;
#endif
}

Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return kFloat16;
    case at::kBFloat16:
      return kBFloat16;
    case at::kFloat:
      return kFloat32;
    default:
      return kFloat64;
  }
}

bool is_wide(Bounds bounds, Arithmetic arithmetic) {
  const double bound = arithmetic == kDouble ? math::kNarrowBound<double> : math::kNarrowBound<float>;
  return !(bounds.low >= -bound && bounds.high <= bound);
}

// One operand of an iteration, as a thread sees it: finds the numbers of each block in the arithmetic type.
class Operand {
 public:
  Operand(at::ScalarType dtype, Arithmetic arithmetic, bool is_output)
      : element_size_(static_cast<int64_t>(c10::elementSize(dtype))),
        is_arithmetic_(storage_of(dtype) == (arithmetic == kDouble ? kFloat64 : kFloat32)),
        is_output_(is_output),
        load_(kernels().load[storage_of(dtype)][arithmetic]),
        store_(kernels().store[storage_of(dtype)][arithmetic]) {}

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
    return data == loaded_data_ && repeats && is_prefix;
  }

  int64_t element_size_;
  bool is_arithmetic_;
  bool is_output_;
  bool is_buffered_ = false;
  Load load_;
  Store store_;
  const char* loaded_data_ = nullptr;
  Tile loaded_tile_{};
  alignas(64) char buffer_[kBlockBytes];
};

int64_t block_numel(Arithmetic arithmetic) { return kBlockBytes / (arithmetic == kDouble ? sizeof(double) : sizeof(float)); }

// Calls compute(pointers, numel) for block after block, the pointers in the order of the iterator's operands. A block holds at
// most block_numel numbers, unless every operand is direct and `whole_rows` allows it.
template <int kMaxOperands, class Compute>
void for_each_block(at::TensorIterator& iterator, Arithmetic arithmetic, bool whole_rows, const Compute& compute) {
  const int64_t block = block_numel(arithmetic);
  const int operand_count = iterator.ntensors();
  iterator.for_each([&](char** data, const int64_t* strides, int64_t columns, int64_t rows) {
    std::array<std::optional<Operand>, kMaxOperands> operands;
    bool all_direct = whole_rows;
    for (int i = 0; i < operand_count; ++i) {
      operands[i].emplace(iterator.dtype(i), arithmetic, i < iterator.noutputs());
      all_direct &= operands[i]->is_direct(strides[i]);
    }
    const bool gather = columns < kLongRow && rows > 1;
    const int64_t width = gather || all_direct ? columns : std::min(columns, block);
    const int64_t height = gather ? block / columns : 1;
    for (int64_t row = 0; row < rows; row += height) {
      for (int64_t column = 0; column < columns; column += width) {
        Tile tile{std::min(width, columns - column), std::min(height, rows - row), 0, 0};
        void* pointers[kMaxOperands];
        for (int i = 0; i < operand_count; ++i) {
          tile.column_stride = strides[i];
          tile.row_stride = strides[operand_count + i];
          pointers[i] = operands[i]->begin_block(data[i] + row * tile.row_stride + column * tile.column_stride, tile);
        }
        compute(pointers, tile.columns * tile.rows);
        for (int i = 0; i < iterator.noutputs(); ++i) {
          tile.column_stride = strides[i];
          tile.row_stride = strides[operand_count + i];
          operands[i]->end_block(data[i] + row * tile.row_stride + column * tile.column_stride, tile);
        }
      }
    }
  });
}

template <Loss loss, size_t kInputs>
at::Tensor forward(const char* function, const std::array<Argument, kInputs>& inputs, Bounds bounds,
                   std::optional<at::ScalarType> dtype) {
  check_forward(function, inputs, bounds.low, bounds.high, dtype);
  const at::ScalarType result = dtype.value_or(result_type(inputs));
  const Arithmetic arithmetic = arithmetic_type(inputs, result) == at::kDouble ? kDouble : kSingle;
  const Forward kernel = kernels().forward[loss][is_wide(bounds, arithmetic)][arithmetic];
  auto iterator = plan_forward(inputs, result, at::kCPU);
  for_each_block<kInputs + 1>(iterator, arithmetic, true,
                              [&](void* const* pointers, int64_t numel) { kernel(pointers[0], pointers + 1, numel, bounds); });
  return iterator.output();
}

// arguments: grad_output, then the inputs.
template <Loss loss, size_t kInputs>
std::array<at::Tensor, kInputs> backward(const char* function, const std::array<Argument, kInputs + 1>& arguments,
                                         Bounds bounds, const std::array<bool, kInputs>& output_mask) {
  check_backward(function, arguments, bounds.low, bounds.high);
  auto gradients = allocate_gradients<kInputs>(arguments, output_mask);
  const int wanted = static_cast<int>(std::count(output_mask.begin(), output_mask.end(), true));
  if (wanted > 0) {
    const Arithmetic arithmetic = arithmetic_type(arguments) == at::kDouble ? kDouble : kSingle;
    const Backward kernel = kernels().backward[loss][is_wide(bounds, arithmetic)][arithmetic];
    auto iterator = plan_backward<kInputs>(arguments, gradients);
    for_each_block<2 * kInputs + 1>(iterator, arithmetic, wanted == kInputs, [&](void* const* pointers, int64_t numel) {
      // The kernels compute every gradient; one that is not wanted stays behind in a scratch block.
      alignas(64) char scratch[kBlockBytes];
      void* results[kInputs];
      int output = 0;
      for (size_t i = 0; i < kInputs; ++i) {
        results[i] = output_mask[i] ? pointers[output++] : scratch;
      }
      kernel(results, pointers[wanted], pointers + wanted + 1, numel, bounds);
    });
    reduce_gradients(gradients);
  }
  return std::move(gradients.result);
}

at::Tensor kl_div_single_loss(const at::Tensor& mu, const at::Tensor& log_var, double clamp_min, double clamp_max,
                              std::optional<at::ScalarType> dtype) {
  return forward<kSingleLoss, 2>("kl_div_single_loss", {{{"mu", mu}, {"log_var", log_var}}}, {clamp_min, clamp_max}, dtype);
}

std::tuple<at::Tensor, at::Tensor> kl_div_single_loss_backward(const at::Tensor& grad_output, const at::Tensor& mu,
                                                               const at::Tensor& log_var, double clamp_min, double clamp_max,
                                                               std::array<bool, 2> output_mask) {
  return std::tuple_cat(backward<kSingleLoss, 2>("kl_div_single_loss_backward",
                                                 {{{"grad_output", grad_output}, {"mu", mu}, {"log_var", log_var}}},
                                                 {clamp_min, clamp_max}, output_mask));
}

at::Tensor kl_div_pair_loss(const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
                            const at::Tensor& log_var_q, double clamp_min, double clamp_max,
                            std::optional<at::ScalarType> dtype) {
  return forward<kPairLoss, 4>("kl_div_pair_loss",
                               {{{"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}}},
                               {clamp_min, clamp_max}, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kl_div_pair_loss_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const at::Tensor& mu_q,
    const at::Tensor& log_var_q, double clamp_min, double clamp_max, std::array<bool, 4> output_mask) {
  return std::tuple_cat(backward<kPairLoss, 4>(
      "kl_div_pair_loss_backward",
      {{{"grad_output", grad_output}, {"mu_p", mu_p}, {"log_var_p", log_var_p}, {"mu_q", mu_q}, {"log_var_q", log_var_q}}},
      {clamp_min, clamp_max}, output_mask));
}

TORCH_LIBRARY_IMPL(kl_ext, CPU, m) {
  m.impl("kl_div_single_loss", kl_div_single_loss);
  m.impl("kl_div_single_loss_backward", kl_div_single_loss_backward);
  m.impl("kl_div_pair_loss", kl_div_pair_loss);
  m.impl("kl_div_pair_loss_backward", kl_div_pair_loss_backward);
}

} // namespace
} // namespace kl_ext::cpu
