#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include "../math/summation.h"
#include "parallel.h"
#include "partials.h"
#include "row_operands.h"

namespace kl_ext::cpu {

// Writes the gradients of p into their rows, and sums those of q over the rows.
//
// The work is cut into pieces: a chunk of rows, some of its columns (a tile), and, if there are fewer of these than threads, a
// part of the lanes, with every row that goes to one of them. For each sum a piece leaves one row of numbers, its lanes folded,
// or, if the lanes of a chunk are in several parts, a row for each lane.
class SumsOverRows {
 public:
  SumsOverRows(const Rows& rows, Arithmetic arithmetic)
      : rows_(rows),
        arithmetic_(arithmetic),
        chunks_(ceil_divide(rows.shape().rows, math::kChunk)),
        tiles_(ceil_divide(columns(), kColumns)),
        lanes_in_use_(math::lanes_in_use(rows.shape().rows)) {
    while (parts_ < lanes_in_use_ && pieces() < at::get_num_threads() &&
           rows.numel() / pieces() >= 2 * at::internal::GRAIN_SIZE) {
      parts_ *= 2;
    }
    for (auto& left : left_) {
      left = std::make_unique_for_overwrite<char[]>(chunks_ * kept_lanes() * row_bytes());
    }
  }

  void run(BackwardToLanes kernel, double grad_output, const Settings& settings) {
    parallel_for(0, pieces(), 1, [&](int64_t begin, int64_t end) {
      const int64_t bytes = lanes() * std::min(kColumns, columns()) * size();
      const auto buffer = std::make_unique_for_overwrite<char[]>(2 * bytes);
      const std::array<char*, 2> lanes_of{buffer.get(), buffer.get() + bytes};
      for (int64_t i = begin; i < end; ++i) {
        const Piece piece = piece_at(i);
        std::fill_n(buffer.get(), 2 * bytes, char{0});
        for (int64_t row = piece.first_row; row < piece.end_row; row += rows_between_turns()) {
          const int64_t count = std::min(piece.end_row - row, rows_of_turn());
          rows_.for_part(row, count, piece.column, piece.width,
                         [&](const Block& block) { kernel(block, lanes_of[0], lanes_of[1], lanes(), grad_output, settings); });
        }
        keep(piece, lanes_of);
      }
    });
  }

  // Called once, after all pieces. sums: of the gradients of mu_q and of log_var_q.
  void finish(const std::array<void*, 2>& sums) {
    for (size_t i = 0; i < left_.size(); ++i) {
      char* const of_chunks = left_[i].get();
      for (int64_t chunk = 0; chunk < chunks_ && parts_ > 1; ++chunk) {
        char* const of_lanes = of_chunks + chunk * kept_lanes() * row_bytes();
        kernels().fold_lanes[arithmetic_](of_lanes, lanes_in_use_, columns());
        std::copy_n(of_lanes, row_bytes(), of_chunks + chunk * row_bytes());
      }
      finish_sums(of_chunks, chunks_, columns(), arithmetic_);
      std::copy_n(of_chunks, row_bytes(), static_cast<char*>(sums[i]));
    }
  }

 private:
  struct Piece {
    int64_t chunk;
    int64_t column; // the first one
    int64_t width;  // in columns
    int64_t first_lane;
    int64_t first_row;
    int64_t end_row;
  };

  int64_t columns() const { return rows_.shape().columns; }
  int64_t size() const { return size_of(arithmetic_); }
  int64_t row_bytes() const { return columns() * size(); }
  int64_t pieces() const { return chunks_ * tiles_ * parts_; }
  int lanes() const { return lanes_in_use_ / parts_; } // of a piece
  int64_t kept_lanes() const { return parts_ == 1 ? 1 : lanes_in_use_; }
  // A kernel puts consecutive rows into consecutive lanes. A turn fills all lanes; a part of them skips the rows of the others.
  int64_t rows_of_turn() const { return parts_ == 1 ? math::kChunk : lanes(); }
  int64_t rows_between_turns() const { return parts_ == 1 ? math::kChunk : math::kLanes; }

  Piece piece_at(int64_t i) const {
    const int64_t first_lane = i % parts_ * lanes();
    const int64_t column = i / parts_ % tiles_ * kColumns;
    const int64_t chunk = i / parts_ / tiles_;
    const int64_t end = std::min((chunk + 1) * math::kChunk, rows_.shape().rows);
    return {chunk, column, std::min(kColumns, columns() - column), first_lane, chunk * math::kChunk + first_lane, end};
  }

  void keep(const Piece& piece, const std::array<char*, 2>& lanes_of) {
    for (size_t i = 0; i < left_.size(); ++i) {
      if (parts_ == 1) {
        kernels().fold_lanes[arithmetic_](lanes_of[i], lanes(), piece.width);
      }
      const Tile tile{piece.width, parts_ == 1 ? 1 : lanes(), size(), row_bytes()};
      char* const row = left_[i].get() + (piece.chunk * kept_lanes() + piece.first_lane) * row_bytes();
      kernels().store[storage_of(arithmetic_)][arithmetic_](row + piece.column * size(), lanes_of[i], tile);
    }
  }

  const Rows& rows_;
  const Arithmetic arithmetic_;
  const int64_t chunks_;
  const int64_t tiles_;
  const int lanes_in_use_;
  int parts_ = 1;
  std::array<std::unique_ptr<char[]>, 2> left_; // of each sum [chunks, kept lanes, columns]
};

} // namespace kl_ext::cpu
