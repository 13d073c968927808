// The small kernels after those that sum: adding up partial sums, and dividing the gradient of a mean.
#include <algorithm>

#include "exchange.cuh"
#include "sum_layout.h"

namespace kl_ext::cuda {
namespace {

// A group of partial sums belongs to a team of neighbouring threads, which loads all its numbers before it uses any.
template <int kGroup>
constexpr std::uint32_t kTeam = kGroup == math::kLanes ? 16 : 32;

// S of a group of at most kGroup numbers `stride` apart. All teams of a warp must call it together.
template <int kGroup, class T, class Numbers>
KL_EXT_DEVICE T sum_group(Numbers numbers, std::int64_t count, std::int64_t stride) {
  constexpr int kItems = math::kLanes / kTeam<kGroup>;
  constexpr int kTurns = kGroup / math::kLanes;
  T values[kTurns][kItems];
  for (int turn = 0; turn < kTurns; ++turn) {
    for (int item = 0; item < kItems; ++item) {
      const std::int64_t i = turn * math::kLanes + item * kTeam<kGroup> + threadIdx.x % kTeam<kGroup>;
      values[turn][item] = i < count ? numbers[i * stride] : T(0);
    }
  }
  T lanes[kItems] = {};
  for (int turn = 0; turn < kTurns; ++turn) {
    for (int item = 0; item < kItems; ++item) {
      lanes[item] += values[turn][item]; // a lane is never -0: adding +0 leaves it as it is
    }
  }
  return fold_among_neighbours<false>(lanes, kTeam<kGroup>);
}

// numbers: [count, outputs, sums], where kGroup of them, chunks or lanes, are a group. The sums of kMaxGroups groups each go to
// parts, or to the results if that is everything. A column belongs to 2^log_teams neighbouring teams; if there are more groups
// than teams, it has the block to itself.
template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const T* numbers, std::int64_t count, std::int32_t outputs, std::int64_t sums, std::int32_t log_teams,
                 T divisor, T* parts, const SumResults results) {
  constexpr std::int64_t kPart = std::int64_t{kGroup} * kMaxGroups;
  KL_EXT_SHARED(T, of_groups, kMaxGroups);
  const std::uint32_t team = threadIdx.x / kTeam<kGroup>;
  const std::uint32_t teams = 1u << log_teams;
  const std::uint32_t in_column = team & (teams - 1);
  const std::uint32_t columns_at_once = kThreads / kTeam<kGroup> >> log_teams;
  const bool speaks = threadIdx.x % kTeam<kGroup> == 0;
  const std::int64_t columns = outputs * sums;
  const std::int64_t tiles = ceil_divide(columns, columns_at_once);
  const std::int64_t part = blockIdx.x / tiles;
  const std::int64_t column = (blockIdx.x - part * tiles) * columns_at_once + (team >> log_teams);
  const std::int64_t left = count - part * kPart < kPart ? count - part * kPart : kPart;
  const std::int64_t own = column < columns ? left : 0;
  const std::int64_t groups = ceil_divide(left, kGroup);
  const T* const of_part = numbers + part * kPart * columns + column;
  const auto of_column = of_groups + (team >> log_teams) * teams;
  KL_EXT_AWAIT_LAUNCH();
  for (std::int64_t group = in_column; group - in_column < groups; group += teams) {
    const std::int64_t first = group * kGroup;
    const T sum = sum_group<kGroup, T>(of_part + first * columns, own - first, columns);
    if (speaks && group < groups) {
      of_column[group] = sum;
    }
  }
  __syncthreads();
  // Every team of a column computes the same sum. Teams may have another size here, so all of them must call sum_group.
  T sum[1];
  sum[0] = groups <= math::kLanes ? sum_group<math::kLanes, T>(of_column, groups, 1)
                                  : sum_group<kMaxGroups, T>(of_column, groups, 1);
  if (speaks && in_column == 0 && column < columns) {
    if (parts != nullptr) {
      parts[part * columns + column] = sum[0];
      return;
    }
    sum[0] /= divisor;
    void* to = results.data[0];
    Storage dtype = results.dtype[0];
    for (int output = 1; output < kMaxOutputs; ++output) {
      if (column >= output * sums) {
        to = results.data[output];
        dtype = results.dtype[output];
      }
    }
    store_rounded(to, dtype, column % sums, 0, 1, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    divide_each(const void* numbers, Storage dtype, std::int64_t numel, T divisor, T* quotients) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < numel) {
    const auto bits = [&](auto size) { return static_cast<const decltype(size)*>(numbers)[i]; };
    using Bits = typename math::Format<T>::Bits;
    const auto width = size_of(dtype);
    quotients[i] = from_storage<T>(dtype, width == 2   ? bits(std::uint16_t{})
                                          : width == 4 ? bits(std::uint32_t{})
                                                       : bits(Bits{})) /
                   divisor;
  }
}

template <int kGroup, class T>
void launch_sum_partials(const T* numbers, std::int64_t count, int outputs, std::int64_t sums, std::int64_t divisor, T* parts,
                         const SumResults& results, CUstream_st* stream) {
  const std::int64_t groups = ceil_divide(count, kGroup);
  const std::int64_t teams = std::min<std::int64_t>(kThreads / kTeam<kGroup>, next_power_of_two(groups));
  const std::int64_t tiles = ceil_divide(outputs * sums, kThreads / kTeam<kGroup> / teams);
  const auto blocks = static_cast<std::uint32_t>(tiles * ceil_divide(groups, kMaxGroups));
  constexpr auto kernel = sum_partials<T, kGroup>;
  KL_EXT_LAUNCH_AFTER(kernel, blocks, kThreads, stream, numbers, count, outputs, sums, log2_of(teams), static_cast<T>(divisor),
                      parts, results);
}

template <class T>
void finish(const T* numbers, Partials partials, int outputs, std::int64_t sums, std::int64_t divisor,
            const SumResults& results, T* scratch, CUstream_st* stream) {
  const auto launch = partials.are_lanes ? launch_sum_partials<math::kLanes, T> : launch_sum_partials<math::kChunk, T>;
  const std::int64_t group = partials.are_lanes ? math::kLanes : math::kChunk;
  const std::int64_t parts = ceil_divide(partials.count, group * kMaxGroups);
  launch(numbers, partials.count, outputs, sums, divisor, parts > 1 ? scratch : nullptr, results, stream);
  if (parts > 1) {
    launch_sum_partials<math::kChunk, T>(scratch, parts, outputs, sums, divisor, nullptr, results, stream);
  }
}

template <class T>
void divide_all(const void* numbers, Storage dtype, std::int64_t numel, std::int64_t divisor, T* quotients,
                CUstream_st* stream) {
  constexpr auto kernel = divide_each<T>;
  KL_EXT_LAUNCH(kernel, static_cast<std::uint32_t>(ceil_divide(numel, kThreads)), kThreads, stream, numbers, dtype, numel,
                static_cast<T>(divisor), quotients);
}

} // namespace

namespace kernels {

void finish_sums(const float* numbers, Partials partials, int outputs, std::int64_t sums, std::int64_t divisor,
                 const SumResults& results, float* scratch, CUstream_st* stream) {
  finish(numbers, partials, outputs, sums, divisor, results, scratch, stream);
}

void finish_sums(const double* numbers, Partials partials, int outputs, std::int64_t sums, std::int64_t divisor,
                 const SumResults& results, double* scratch, CUstream_st* stream) {
  finish(numbers, partials, outputs, sums, divisor, results, scratch, stream);
}

void divide(const void* numbers, Storage dtype, std::int64_t numel, std::int64_t divisor, float* quotients,
            CUstream_st* stream) {
  divide_all(numbers, dtype, numel, divisor, quotients, stream);
}

void divide(const void* numbers, Storage dtype, std::int64_t numel, std::int64_t divisor, double* quotients,
            CUstream_st* stream) {
  divide_all(numbers, dtype, numel, divisor, quotients, stream);
}

} // namespace kernels

} // namespace kl_ext::cuda
