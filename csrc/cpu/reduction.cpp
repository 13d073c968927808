#include "reduction.h"

#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "../math/summation.h"
#include "parallel.h"
#include "partials.h"

namespace kl_ext::cpu {
namespace {

using math::kChunk;
using math::kLanes;

// Tiles with fewer columns would waste vectors.
constexpr int64_t kNarrowest = 32;
// The least number of terms for a thread.
constexpr int64_t kGrain = 32768;

// A dimension, or several that every operand walks as one.
struct Axis {
  int64_t size;
  bool reduced;
  c10::SmallVector<int64_t, kMaxOperands> strides;
};

using Axes = c10::SmallVector<Axis, 8>;

Axes merged_axes(at::IntArrayRef shape, c10::ArrayRef<bool> reduced, c10::ArrayRef<SumOperand> operands) {
  Axes axes;
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    if (shape[dim] == 1) {
      continue;
    }
    Axis axis{shape[dim], reduced[dim], {}};
    for (const auto& operand : operands) {
      axis.strides.push_back(operand.strides[dim]);
    }
    bool merges = !axes.empty() && axes.back().reduced == axis.reduced;
    for (size_t i = 0; merges && i < operands.size(); ++i) {
      merges = axes.back().strides[i] == axis.strides[i] * axis.size;
    }
    if (merges) {
      axis.size *= axes.back().size;
      axes.back() = std::move(axis);
    } else {
      axes.push_back(std::move(axis));
    }
  }
  return axes;
}

int64_t numel_of(const Axes& axes) {
  return std::accumulate(axes.begin(), axes.end(), int64_t{1}, [](int64_t n, const Axis& axis) { return n * axis.size; });
}

class Summation {
 public:
  Summation(at::IntArrayRef shape, c10::ArrayRef<bool> reduced, c10::ArrayRef<SumOperand> operands, Arithmetic arithmetic,
            const GivenQ& given, Compute compute, std::optional<AddTerms> accumulate)
      : operands_(operands), arithmetic_(arithmetic), given_(given), compute_(compute), accumulate_(accumulate) {
    for (auto& axis : merged_axes(shape, reduced, operands)) {
      (axis.reduced ? reduced_ : kept_).push_back(std::move(axis));
    }
    for (auto* axes : {&reduced_, &kept_}) { // a single term or a single sum: add an axis of size 1
      if (axes->empty()) {
        axes->push_back({1, axes == &reduced_, c10::SmallVector<int64_t, kMaxOperands>(operands.size(), 0)});
      }
    }
    terms_ = numel_of(reduced_);
    sums_ = numel_of(kept_);
  }

  void run() {
    if (sums_ == 0) {
      return;
    }
    if (terms_ == 0) {
      for (const auto& operand : operands_) {
        if (operand.role == SumOperand::kSummedOutput) {
          const auto zeros = std::make_unique<char[]>(sums_ * size_of(arithmetic_));
          write_sums(operand, zeros.get(), 0, sums_);
        }
      }
    } else if (kept_is_fast()) {
      run_chunks(/*by_columns=*/true);
    } else if (terms_ < kLongRow && reduced_.size() == 1) {
      run_short_rows();
    } else {
      run_chunks(/*by_columns=*/false);
    }
  }

 private:
  static constexpr int kNoLane = -1;
  using Offsets = std::array<int64_t, kMaxOperands>;

  // A thread's operands and accumulators.
  struct Workspace {
    Workspace(const Summation& sum, int64_t columns) : prepared(sum.given_) {
      for (size_t i = 0; i < sum.operands_.size(); ++i) {
        const SumOperand& operand = sum.operands_[i];
        if (operand.role == SumOperand::kSummedOutput) {
          lanes[i] = std::make_unique_for_overwrite<char[]>(kLanes * columns * size_of(sum.arithmetic_));
        } else {
          operands[i].emplace(operand.dtype, sum.arithmetic_, operand.role == SumOperand::kElementwiseOutput, buffers[i]);
        }
      }
    }

    alignas(64) char buffers[kMaxOperands][kBlockBytes]; // for operands, or for the terms of a sum
    std::array<std::optional<Operand>, kMaxOperands> operands;
    std::array<std::unique_ptr<char[]>, kMaxOperands> lanes;
    PreparedQ prepared;
  };

  // Divides and rounds sums in place, and writes them to their destination.
  void write_sums(const SumOperand& operand, char* sums, int64_t first, int64_t count) const {
    if (operand.divisor) {
      kernels().divide[arithmetic_](sums, count, *operand.divisor);
    }
    const auto element_size = static_cast<int64_t>(c10::elementSize(operand.dtype));
    kernels().store[storage_of(operand.dtype)][arithmetic_](operand.data + first * element_size, sums,
                                                            Tile{count, 1, element_size, 0});
  }

  // Whether most of the operands have a smaller stride along the last kept axis than along the last reduced one.
  bool kept_is_fast() const {
    int votes = 0;
    for (size_t i = 0; i < operands_.size(); ++i) {
      const int64_t kept = std::abs(kept_.back().strides[i]);
      const int64_t reduced = std::abs(reduced_.back().strides[i]);
      votes += kept != 0 && reduced != 0 ? (kept < reduced ? 1 : -1) : 0;
    }
    return votes > 0 && kept_.back().size > 1;
  }

  // Adds the offsets of the coordinates with number `rank` in the row-major order of the first `count` axes.
  void add_offsets(const Axes& axes, size_t count, int64_t rank, Offsets& offsets) const {
    for (size_t axis = count; axis-- > 0;) {
      const int64_t coordinate = rank % axes[axis].size;
      rank /= axes[axis].size;
      for (size_t i = 0; i < operands_.size(); ++i) {
        offsets[i] += coordinate * axes[axis].strides[i];
      }
    }
  }

  // The size of the next tile, with at most `limit` terms: the number of rows of the last reduced axis, and their length. If
  // they are short, a tile has several, along the axis before the last. By columns, every term is a row of its own.
  std::pair<int64_t, int64_t> rows_from(int64_t term, int64_t limit, bool by_columns) const {
    const int64_t inner = reduced_.back().size;
    const int64_t left = std::min(inner - term % inner, limit);
    if (by_columns) {
      return {left, 1};
    }
    if (reduced_.size() == 1 || term % inner != 0 || limit < 2 * inner) {
      return {1, left};
    }
    const int64_t rows = reduced_[reduced_.size() - 2].size;
    return {std::min(rows - term / inner % rows, limit / inner), inner};
  }

  // Computes the terms of a tile, [rows, columns] of the given axes. With a first lane, adds them to the lanes of the only sum.
  void compute_tile(Workspace& workspace, const Offsets& offsets, const Axis& row_axis, int64_t rows, const Axis& column_axis,
                    int64_t columns, int first_lane = kNoLane) const {
    void* pointers[kMaxOperands];
    const void* prepared_q = nullptr;
    const auto tile = [&](size_t i) { return Tile{columns, rows, column_axis.strides[i], row_axis.strides[i]}; };
    for (size_t i = 0; i < operands_.size(); ++i) {
      pointers[i] = operands_[i].role == SumOperand::kSummedOutput
                        ? workspace.buffers[i]
                        : workspace.operands[i]->begin_block(operands_[i].data + offsets[i], tile(i));
    }
    if (given_.log_var_q >= 0) {
      const int q = given_.log_var_q;
      const bool shares_q = row_axis.strides[q] == 0 && row_axis.size > 1;
      prepared_q = workspace.prepared.find(operands_[q].data + offsets[q], tile(q), pointers[q], shares_q);
    }
    if (first_lane != kNoLane) {
      (*accumulate_)(workspace.lanes[0].get(), pointers + 1, prepared_q, first_lane, rows * columns);
      return;
    }
    compute_(pointers, prepared_q, rows * columns);
    for (size_t i = 0; i < operands_.size(); ++i) {
      if (operands_[i].role == SumOperand::kElementwiseOutput) {
        workspace.operands[i]->end_block(operands_[i].data + offsets[i], tile(i));
      }
    }
  }

  // Runs several short rows to a block.
  void run_short_rows() {
    const Axis& rows = kept_.back();
    const int64_t height = block_numel(arithmetic_) / terms_;
    const int64_t tiles = ceil_divide(rows.size, height);
    const int64_t items = sums_ / rows.size * tiles;
    parallel_for(0, items, std::max<int64_t>(1, kGrain / (height * terms_)), [&](int64_t begin, int64_t end) {
      Workspace workspace(*this, 0);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % tiles * height;
        const int64_t count = std::min(height, rows.size - first);
        Offsets offsets{};
        add_offsets(kept_, kept_.size() - 1, item / tiles, offsets);
        for (size_t i = 0; i < operands_.size(); ++i) {
          offsets[i] += first * rows.strides[i];
        }
        compute_tile(workspace, offsets, rows, count, reduced_.back(), terms_);
        for (size_t i = 0; i < operands_.size(); ++i) {
          if (operands_[i].role == SumOperand::kSummedOutput) {
            char* terms = workspace.buffers[i];
            kernels().sum_rows[arithmetic_](/*sums=*/terms, terms, count, terms_);
            write_sums(operands_[i], terms, item / tiles * rows.size + first, count);
          }
        }
      }
    });
  }

  // How many columns are summed at once: fewer if there are fewer pieces of work than threads.
  int64_t width_of_tiles(int64_t columns, int64_t pieces) const {
    const int64_t wanted = ceil_divide(at::get_num_threads(), pieces);
    const int64_t narrow = ceil_divide(ceil_divide(columns, wanted), kNarrowest) * kNarrowest;
    return std::min({columns, kColumns, terms_ * columns > kGrain ? narrow : columns});
  }

  // Runs chunk by chunk; each leaves a partial sum for every column.
  void run_chunks(bool by_columns) {
    const Axis& column_axis = by_columns ? kept_.back() : reduced_.back();
    const Axis& row_axis = reduced_[std::max<size_t>(reduced_.size(), 2) - 2];
    const int64_t kept_columns = by_columns ? kept_.back().size : 1;
    const int64_t chunks = ceil_divide(terms_, kChunk);
    const int64_t width = width_of_tiles(kept_columns, sums_ / kept_columns * chunks);
    const int64_t tiles = ceil_divide(kept_columns, width);
    const int64_t items = sums_ / kept_columns * tiles * chunks;
    const int64_t size = size_of(arithmetic_);
    const int64_t block_rows = block_numel(arithmetic_) / width;

    std::array<std::unique_ptr<char[]>, kMaxOperands> partials;
    for (size_t i = 0; chunks > 1 && i < operands_.size(); ++i) {
      if (operands_[i].role == SumOperand::kSummedOutput) {
        partials[i] = std::make_unique_for_overwrite<char[]>(chunks * sums_ * size);
      }
    }

    const int64_t grain = std::max<int64_t>(1, kGrain / (std::min<int64_t>(terms_, kChunk) * width));
    parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
      Workspace workspace(*this, width);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t chunk = item % chunks;
        const int64_t first_column = item / chunks % tiles * width;
        const int64_t outer = item / chunks / tiles;
        const int64_t columns = std::min(width, kept_columns - first_column);
        const int64_t first_term = chunk * kChunk;
        const int64_t count = std::min<int64_t>(kChunk, terms_ - first_term);
        const int in_use = math::lanes_in_use(count);
        for (const auto& lanes : workspace.lanes) {
          if (lanes) {
            std::fill_n(lanes.get(), in_use * columns * size, char{0});
          }
        }
        Offsets base{};
        add_offsets(kept_, kept_.size() - (by_columns ? 1 : 0), outer, base);
        for (size_t i = 0; by_columns && i < operands_.size(); ++i) {
          base[i] += first_column * column_axis.strides[i];
        }
        for (int64_t done = 0; done < count;) {
          const int64_t term = first_term + done;
          Offsets offsets = base;
          add_offsets(reduced_, reduced_.size(), term, offsets);
          const auto [rows, row_length] = rows_from(term, std::min(count - done, block_rows), by_columns);
          if (by_columns) {
            compute_tile(workspace, offsets, reduced_.back(), rows, column_axis, columns);
          } else {
            const int first_lane = accumulate_ ? static_cast<int>(done % kLanes) : kNoLane;
            compute_tile(workspace, offsets, row_axis, rows, column_axis, row_length, first_lane);
          }
          const int64_t computed = rows * row_length;
          for (size_t i = 0; i < operands_.size() && (by_columns || !accumulate_); ++i) {
            if (workspace.lanes[i]) {
              kernels().add_to_lanes[arithmetic_](workspace.lanes[i].get(), workspace.buffers[i],
                                                  static_cast<int>(done % kLanes), computed, columns);
            }
          }
          done += computed;
        }
        for (size_t i = 0; i < operands_.size(); ++i) {
          if (workspace.lanes[i]) {
            kernels().fold_lanes[arithmetic_](workspace.lanes[i].get(), in_use, columns);
            const int64_t first_sum = outer * kept_columns + first_column;
            if (partials[i]) {
              std::copy_n(workspace.lanes[i].get(), columns * size, partials[i].get() + (chunk * sums_ + first_sum) * size);
            } else {
              write_sums(operands_[i], workspace.lanes[i].get(), first_sum, columns);
            }
          }
        }
      }
    });
    for (size_t i = 0; i < operands_.size(); ++i) {
      if (partials[i]) {
        finish_sums(partials[i].get(), chunks, sums_, arithmetic_);
        write_sums(operands_[i], partials[i].get(), 0, sums_);
      }
    }
  }

  c10::ArrayRef<SumOperand> operands_;
  Arithmetic arithmetic_;
  GivenQ given_;
  Compute compute_;
  std::optional<AddTerms> accumulate_;
  Axes reduced_;
  Axes kept_;
  int64_t terms_; // of each sum
  int64_t sums_;
};

} // namespace

SumOperand::SumOperand(const at::Tensor& tensor, Role operand_role, at::IntArrayRef shape)
    : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
      dtype(tensor.scalar_type()),
      role(operand_role),
      strides(tensor.expand(shape).strides()) {
  for (auto& stride : strides) {
    stride *= static_cast<int64_t>(tensor.element_size());
  }
}

SumOperand::SumOperand(const at::Tensor& sums, std::optional<int64_t> sums_divisor, size_t dims)
    : data(static_cast<char*>(sums.data_ptr())),
      dtype(sums.scalar_type()),
      role(kSummedOutput),
      strides(dims, 0),
      divisor(sums_divisor) {}

void sum_terms(at::IntArrayRef shape, c10::ArrayRef<bool> reduced, c10::ArrayRef<SumOperand> operands, Arithmetic arithmetic,
               const GivenQ& given, Compute compute, std::optional<AddTerms> accumulate) {
  Summation(shape, reduced, operands, arithmetic, given, compute, accumulate).run();
}

} // namespace kl_ext::cpu
