// The fuzz targets for layouts: divisions, pieces, plans and the layouts of sums.
#pragma once

#include <array>
#include <cmath>
#include <vector>

#include "bytes.h"

// The range of indices is that of a GPU, or a small one that cuts small tensors like large ones.
static std::int64_t indices = std::int64_t{1} << 31;
#define KL_EXT_INDICES indices
#define KL_EXT_PREPARING_THREADS 1
#include "cuda/sum_layout.h"

namespace {

using namespace kl_ext;

// Divisions, and the numbers that chunks and lanes have.

void dividers(Bytes& bytes) {
  constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1;
  const std::int64_t size = bytes.size(kMost);
  const cuda::Divider divider(size);
  CHECK(divider.divisor == size);
  for (int i = 0; i < 8; ++i) {
    // Anything, or next to a multiple.
    const std::int64_t any = bytes.size(kMost);
    const std::int64_t n = std::clamp<std::int64_t>(bytes.flip() ? any : any / size * size + bytes.below(3) - 1, 0, kMost);
    CHECK(divider.quotient(static_cast<std::uint32_t>(n)) == n / size);
  }
}

void chunks(Bytes& bytes) {
  const std::int64_t chunks = 1 + bytes.below(5000);
  std::vector<std::vector<std::int64_t>> lanes;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::size_t lane = chunk / 1024 * 64 + chunk % 1024 % 64;
    lanes.resize(std::max(lanes.size(), lane + 1));
    lanes[lane].push_back(chunk);
  }
  std::size_t fullest = 0;
  for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
    fullest = std::max(fullest, lanes[lane].size());
    CHECK(cuda::chunk_of(lane, 1) == lanes[lane][0]);
    CHECK(cuda::chunk_of(lane, 0) == static_cast<std::int64_t>(lane));
  }
  CHECK(cuda::lanes_of(chunks) == static_cast<std::int64_t>(lanes.size()));
  CHECK(cuda::turns_of(chunks) == static_cast<std::int64_t>(fullest));
  const std::int64_t n = bytes.size(std::int64_t{1} << 36);
  const std::int64_t power = cuda::next_power_of_two(n);
  CHECK(power >= n && power / 2 < n && (power & (power - 1)) == 0);
  CHECK(power == std::int64_t{1} << cuda::log2_of(power));
}

// Layouts: plain loops over 64-bit coordinates say where each number lies.

constexpr int kOperands = 3;
using Coordinates = std::array<std::int64_t, cuda::kMaxDims>;

template <class Iteration>
Coordinates coordinates_of(const Iteration& iteration, std::int64_t rank) {
  Coordinates coordinates{};
  for (int dim = 0; dim < iteration.ndim; ++dim) {
    coordinates[dim] = rank % iteration.sizes[dim];
    rank /= iteration.sizes[dim];
  }
  return coordinates;
}

char* place_of(const cuda::Operand& operand, const Coordinates& coordinates) {
  char* place = operand.data;
  for (int dim = 0; dim < cuda::kMaxDims; ++dim) {
    place += coordinates[dim] * operand.strides[dim];
  }
  return place;
}

// Where a thread finds number `index` of a plan, as access.cuh and sum_access.cuh compute it.

char* place_in(const cuda::StridedPlan<kOperands>& plan, int operand, std::int64_t index, int) {
  auto rest = static_cast<std::uint32_t>(index);
  std::int32_t offset = 0;
  for (int dim = 0; dim < plan.ndim; ++dim) {
    const std::uint32_t quotient = plan.sizes[dim].quotient(rest);
    offset += static_cast<std::int32_t>(rest - quotient * plan.sizes[dim].divisor) * plan.strides[dim][operand];
    rest = quotient;
  }
  return plan.operand[operand].data + offset;
}

char* place_in(const cuda::TermsPlan<kOperands>& plan, int operand, std::int64_t index, int) {
  std::int64_t offset = 0;
  for (int dim = 0; dim < plan.ndim; ++dim) {
    const std::int64_t quotient =
        plan.is_small ? plan.dividers[dim].quotient(static_cast<std::uint32_t>(index)) : index / plan.sizes[dim];
    offset += (index - quotient * plan.sizes[dim]) * plan.strides[dim][operand];
    index = quotient;
  }
  return plan.operand[operand].data + offset;
}

char* place_in(const cuda::VectorPlan<kOperands>& plan, int operand, std::int64_t index, int items) {
  const auto& [data, strides, is_splat] = plan.operand[operand];
  const std::int64_t size = cuda::kVectorBytes / items;
  auto rest = static_cast<std::uint32_t>(index / items);
  std::uint32_t offset = 0;
  for (int dim = 0; dim < cuda::kMaxVectorDims; ++dim) {
    const bool is_last = dim + 1 >= plan.ndim;
    const std::uint32_t quotient = is_last ? 0 : plan.sizes[dim].quotient(rest);
    offset += (is_last ? rest : rest - quotient * plan.sizes[dim].divisor) * strides[dim];
    rest = quotient;
  }
  return is_splat ? data + offset * size : data + offset * cuda::kVectorBytes + index % items * size;
}

char* place_in(const cuda::RowPlan<kOperands>& plan, int operand, std::int64_t index, int items) {
  const auto vector = static_cast<std::uint32_t>(index / items);
  const std::uint32_t row = plan.vectors.quotient(vector);
  const std::uint32_t offset = vector - row * plan.vectors.divisor + row * plan.pitch[operand];
  return plan.data[operand] + std::int64_t{offset} * cuda::kVectorBytes + index % items * (cuda::kVectorBytes / items);
}

// Operand 0 lies in the order of the dimensions, with gaps. The others may do so, or not change along some dimensions, or run
// backwards, or in another order. Nobody looks at the memory.
cuda::Iteration next_iteration(Bytes& bytes, cuda::Storage dtype, std::int64_t most) {
  cuda::Iteration iteration;
  iteration.operands = kOperands;
  iteration.ndim = 1 + static_cast<int>(bytes.below(16) == 0 ? bytes.below(cuda::kMaxDims) : bytes.below(6));
  const std::int64_t multiple = bytes.flip() ? 8 : 1; // of dimension 0: vectors are likely
  for (int dim = 0; dim < iteration.ndim; ++dim) {
    const std::int64_t size = iteration.ndim > 6 ? 1 + bytes.below(2) : bytes.size(most);
    iteration.sizes[dim] = std::min(dim == 0 ? size * multiple : size, most);
    most = std::max<std::int64_t>(most / iteration.sizes[dim], 1);
  }
  for (int i = 0; i < kOperands; ++i) {
    cuda::Operand& operand = iteration.operand[i];
    operand.data =
        reinterpret_cast<char*>((std::uintptr_t{1 + static_cast<unsigned>(i)} << 56) + (bytes.below(8) == 0 ? 8 : 0));
    operand.dtype = dtype;
    const std::int64_t kind = i == 0 ? 0 : bytes.below(5);
    const bool is_reversed = kind == 2;
    std::int64_t stride = cuda::size_of(dtype);
    for (int n = 0; n < iteration.ndim; ++n) {
      const int dim = is_reversed ? iteration.ndim - 1 - n : n;
      const bool is_broadcast = kind == 1 && bytes.flip();
      operand.strides[dim] = is_broadcast ? 0 : kind == 3 && bytes.flip() ? -stride : stride;
      stride *= is_broadcast ? 1 : iteration.sizes[dim];
      stride += bytes.below(8) == 0 && iteration.sizes[dim] > 1 ? cuda::kVectorBytes * (1 + bytes.below(2)) : 0;
    }
  }
  if (bytes.below(8) == 0) {
    iteration.operand[2] = {}; // a gradient that is not wanted
  }
  return iteration;
}

// All ranks where there are few, else some, the first and the last among them.
template <class Visit>
void for_some(Bytes& bytes, std::int64_t count, const Visit& visit) {
  constexpr std::int64_t kFew = 24;
  for (std::int64_t i = 0; i < std::min(count, kFew); ++i) {
    visit(count <= kFew || i < 2 ? i : i < 4 ? count - i + 1 : bytes.below(count));
  }
}

// A piece is a box: operand 0 of the whole says where it starts.
Coordinates start_of(const cuda::Iteration& whole, const cuda::Iteration& piece) {
  Coordinates start{};
  std::int64_t offset = piece.operand[0].data - whole.operand[0].data;
  for (int dim = whole.ndim - 1; dim >= 0; --dim) {
    const std::int64_t stride = whole.operand[0].strides[dim];
    start[dim] = whole.sizes[dim] == 1 ? 0 : offset / stride;
    offset -= start[dim] * stride;
  }
  CHECK(offset == 0);
  return start;
}

// Whether boxes within the whole cover each element once: none overlaps another, and together they have as many.
void check_cover(const cuda::Iteration& whole, const std::vector<cuda::Iteration>& pieces) {
  std::vector<Coordinates> starts;
  std::int64_t numel = 0;
  const auto size_in = [](const cuda::Iteration& piece, int dim) { return dim < piece.ndim ? piece.sizes[dim] : 1; };
  for (const auto& piece : pieces) {
    const Coordinates start = start_of(whole, piece);
    numel += cuda::numel_of(piece);
    for (int dim = 0; dim < whole.ndim; ++dim) {
      CHECK(size_in(piece, dim) >= 1 && start[dim] + size_in(piece, dim) <= whole.sizes[dim]);
    }
    for (std::size_t other = 0; other < starts.size(); ++other) {
      bool apart = false;
      for (int dim = 0; dim < whole.ndim; ++dim) {
        apart |= start[dim] + size_in(piece, dim) <= starts[other][dim] ||
                 starts[other][dim] + size_in(pieces[other], dim) <= start[dim];
      }
      CHECK(apart);
    }
    for (int i = 0; i < kOperands; ++i) {
      const cuda::Operand& operand = whole.operand[i];
      CHECK(piece.operand[i].data == (operand.data == nullptr ? nullptr : place_of(operand, start)));
    }
    starts.push_back(start);
  }
  CHECK(numel == cuda::numel_of(whole));
}

template <class Plan>
void check_places(Bytes& bytes, const Plan& plan, const cuda::Iteration& piece, int items) {
  for_some(bytes, cuda::numel_of(piece), [&](std::int64_t rank) {
    for (int i = 0; i < kOperands; ++i) {
      if (piece.operand[i].data != nullptr) {
        CHECK(place_in(plan, i, rank, items) == place_of(piece.operand[i], coordinates_of(piece, rank)));
      }
    }
  });
}

// Every vector is aligned; splats have one number for it.
template <class Plan>
void check_vectors(Bytes& bytes, const Plan& plan, const cuda::Iteration& piece, int items) {
  check_places(bytes, plan, piece, items);
  for_some(bytes, cuda::numel_of(piece), [&](std::int64_t rank) {
    for (int i = 0; i < kOperands; ++i) {
      if (piece.operand[i].data != nullptr && cuda::is_vector(piece.operand[i])) {
        CHECK(reinterpret_cast<std::uintptr_t>(place_in(plan, i, rank / items * items, items)) % cuda::kVectorBytes == 0);
      }
    }
  });
}

struct Case {
  cuda::Iteration iteration;
  int items;
};

Case next_case(Bytes& bytes) {
  constexpr cuda::Storage kDtypes[] = {cuda::kFloat16, cuda::kFloat32, cuda::kFloat64};
  const cuda::Storage dtype = kDtypes[bytes.below(3)];
  const bool is_large = bytes.flip();
  indices = std::int64_t{1} << (is_large ? 31 : 6 + bytes.below(8));
  const std::int64_t most = is_large ? std::int64_t{1} << 33 : 4 * indices;
  return {next_iteration(bytes, dtype, most), static_cast<int>(cuda::kVectorBytes / cuda::size_of(dtype))};
}

void pieces(Bytes& bytes) {
  const auto [iteration, items] = next_case(bytes);
  const auto cut = [&](int max_dims, const auto& fits, const auto& check) {
    std::vector<cuda::Iteration> all;
    cuda::for_each_piece(iteration, max_dims, fits, [&](const cuda::Iteration& piece) {
      CHECK(piece.ndim <= max_dims && fits(piece));
      all.push_back(piece);
    });
    check_cover(iteration, all);
    for_some(bytes, static_cast<std::int64_t>(all.size()), [&](std::int64_t i) { check(all[i]); });
  };
  std::int64_t outer = 1; // the pieces that too many dimensions make
  for (int dim = cuda::kMaxStridedDims; dim < iteration.ndim; ++dim) {
    outer *= iteration.sizes[dim];
  }
  if (outer <= 16) {
    cut(cuda::kMaxStridedDims, cuda::fits_strided_indices, [&](const cuda::Iteration& piece) {
      const auto plan = cuda::plan_strides<kOperands>(piece);
      CHECK(plan.numel == cuda::numel_of(piece));
      check_places(bytes, plan, piece, items);
    });
  }
  if (cuda::fits_vectors(iteration, items, /*outputs=*/1)) {
    const auto fits = [&](const cuda::Iteration& piece) { return cuda::fits_vector_indices(piece, items); };
    cut(cuda::kMaxVectorDims, fits, [&](const cuda::Iteration& piece) {
      const auto plan = cuda::plan_vectors<kOperands>(piece, items);
      CHECK(std::int64_t{plan.vectors} * items + plan.tail == cuda::numel_of(piece));
      CHECK(plan.tail == 0 || piece.ndim == 1);
      check_vectors(bytes, plan, piece, items);
      if (cuda::is_in_rows(piece)) { // the kernel for rows divides once, also where there is one row only
        CHECK(plan.sizes[0].quotient(plan.vectors) == (piece.ndim == 1 ? 0 : piece.sizes[1]));
      }
    });
  }
}

// The dimensions of a summation that are kept, or reduced, as they were given.
cuda::Iteration dims_of(const cuda::Summation& summation, bool reduced) {
  cuda::Iteration some;
  for (int i = 0; i < kOperands; ++i) {
    some.operand[i].data = summation.terms.operand[i].data;
  }
  for (int dim = 0; dim < summation.terms.ndim; ++dim) {
    if (summation.reduced[dim] == reduced) {
      some.sizes[some.ndim] = summation.terms.sizes[dim];
      for (int i = 0; i < kOperands; ++i) {
        some.operand[i].strides[some.ndim] = summation.terms.operand[i].strides[dim];
      }
      ++some.ndim;
    }
  }
  return some;
}

double fastest_stride(const cuda::Iteration& dims, int operand) {
  int dim = 0;
  while (dims.sizes[dim] == 1) {
    ++dim;
  }
  return std::abs(static_cast<double>(dims.operand[operand].strides[dim]));
}

void sum_layouts(Bytes& bytes) {
  const auto [iteration, items] = next_case(bytes);
  cuda::Summation summation{iteration};
  const std::uint64_t reduced = bytes.next();
  for (int dim = 0; dim < iteration.ndim; ++dim) {
    summation.reduced[dim] = reduced >> dim & 1;
  }
  const std::int64_t outputs = bytes.below(cuda::kMaxOutputs + 1);
  std::fill_n(summation.summed, outputs, true);

  const cuda::SumLayout layout = cuda::lay_out(summation);
  const cuda::Iteration kept_dims = dims_of(summation, false);
  const cuda::Iteration reduced_dims = dims_of(summation, true);
  const std::int64_t sums = cuda::numel_of(kept_dims);
  const std::int64_t count = cuda::numel_of(reduced_dims);
  const std::int64_t chunks = (count + 1023) / 1024;
  CHECK(layout.sums == sums && layout.count == count && layout.chunks == chunks && layout.outputs == outputs);
  const std::int64_t scratch = cuda::scratch_numel(summation);
  const auto of_all = [&](std::int64_t numbers, int log_part) {
    return chunks == 1 ? 0 : (numbers + ((numbers - 1) >> log_part) + 1) * outputs * sums;
  };
  bool may_share = false;
  for (const int each : {2, 4, 8}) { // the numbers of a thread
    const cuda::LaneSharing sharing(layout, each);
    CHECK(sharing.lanes * sharing.parts == math::lanes_in_use(count) && sharing.sharers * sharing.lanes <= cuda::kThreads);
    may_share |= layout.by_columns && sharing.sharers > 1;
    const bool leaves_lanes = layout.by_columns && sharing.parts > 1;
    CHECK(scratch >= (leaves_lanes ? of_all(64 * chunks, 16) : of_all(chunks, 20)));
  }
  CHECK(may_share || scratch == of_all(chunks, 20));
  const cuda::ChunkSharing sharing(layout, items, bytes.next() & 1);
  CHECK(sharing.of_chunk() <= cuda::kThreads && sharing.chunks == sums * chunks);
  CHECK(sharing.width * items >= math::lanes_in_use(count));
  const bool prepares = sharing.prepares_q(layout, 256);

  if (sums > 1 && count > 1) { // which of the fastest dimensions is the faster for most operands
    int votes = 0;
    for (int i = 0; i < kOperands; ++i) {
      const double kept_stride = fastest_stride(kept_dims, i);
      const double reduced_stride = fastest_stride(reduced_dims, i);
      votes += kept_stride * reduced_stride == 0 ? 0 : kept_stride < reduced_stride ? 1 : -1;
    }
    CHECK(layout.by_columns == (votes > 0));
  }

  const auto check = [&](const auto& plan) {
    if (prepares) { // all rows have one q
      const std::int64_t row = layout.terms.sizes[0];
      for_some(bytes, sums * count, [&](std::int64_t rank) {
        for (int i = kOperands - 2; i < kOperands; ++i) {
          CHECK(iteration.operand[i].data == nullptr || place_in(plan, i, rank, items) == place_in(plan, i, rank % row, items));
        }
      });
    }
    const auto check_term = [&](std::int64_t sum, std::int64_t term) {
      const std::int64_t rank = layout.by_columns ? term * sums + sum : sum * count + term;
      for (int i = 0; i < kOperands; ++i) {
        if (iteration.operand[i].data != nullptr) {
          cuda::Operand place = reduced_dims.operand[i];
          place.data = place_of(kept_dims.operand[i], coordinates_of(kept_dims, sum));
          CHECK(place_in(plan, i, rank, items) == place_of(place, coordinates_of(reduced_dims, term)));
        }
      }
    };
    for_some(bytes, sums, [&](std::int64_t sum) { for_some(bytes, count, [&](std::int64_t term) { check_term(sum, term); }); });
  };
  check(cuda::plan_terms<kOperands>(layout.terms));
  if (layout.fast_dims > 0 && cuda::fits_vectors(layout.terms, items, 1) && cuda::fits_vector_indices(layout.terms, items)) {
    check(cuda::plan_vectors<kOperands>(layout.terms, items));
    if (!layout.by_columns && cuda::is_in_rows(layout.terms) && layout.terms.sizes[0] % items == 0) {
      check(cuda::plan_rows<kOperands>(layout.terms, items));
    }
  }
}

} // namespace
