// The small kernels beside those that sum: what sums up the chunks, the division of the gradient of a mean, and rounding.
#include <algorithm>

#include "exchange.cuh"
#include "sum_layout.h"

namespace kl_ext::cuda {
namespace {

constexpr std::uint32_t kTeam = 16; // threads that work on a chunk together
constexpr std::uint32_t kTeams = kThreads / kTeam;
constexpr int kItems = math::kLanes / kTeam;

// S of at most 1024 numbers `stride` apart, by a team; both teams of a warp come here together.
template <class T, class Numbers>
KL_EXT_DEVICE T sum_chunk(Numbers numbers, std::int64_t count, std::int64_t stride) {
  constexpr int kStepsAtOnce = 4; // their loads go out before any number is used
  T lanes[kItems] = {};
  for (std::int64_t first = threadIdx.x % kTeam; first < count; first += kStepsAtOnce * math::kLanes) {
    T values[kStepsAtOnce][kItems];
    for (int step = 0; step < kStepsAtOnce; ++step) {
      for (int item = 0; item < kItems; ++item) {
        const std::int64_t i = first + step * math::kLanes + item * kTeam;
        values[step][item] = i < count ? numbers[i * stride] : T(0);
      }
    }
    for (int step = 0; step < kStepsAtOnce; ++step) {
      for (int item = 0; item < kItems; ++item) {
        lanes[item] += values[step][item]; // a lane is never -0: adding +0 leaves it as it is
      }
    }
  }
  return fold_among_neighbours<false>(lanes, kTeam);
}

KL_EXT_INLINE std::int64_t chunk_size(std::int64_t count, std::int64_t first) {
  const std::int64_t left = count > first ? count - first : 0;
  return left < math::kChunk ? left : math::kChunk;
}

// partials: [chunks, columns]; sums: [groups of 1024 chunks, columns], a team for each.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_groups(const T* partials, std::int64_t chunks, std::int64_t columns, T* sums) {
  const std::int64_t sum = static_cast<std::int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
  const std::int64_t first = sum / columns * math::kChunk;
  const std::int64_t count = chunk_size(chunks, first);
  const T result = sum_chunk<T>(partials + first * columns + sum % columns, count, columns);
  if (threadIdx.x % kTeam == 0 && count > 0) {
    sums[sum] = result;
  }
}

// partials: [chunks, columns] of at most 64 groups; sums: [columns]. A column for 2^log_teams teams beside each other.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_last(const T* partials, std::int64_t chunks, std::int64_t columns, std::int32_t log_teams, T divisor, T* sums) {
  KL_EXT_SHARED(T, of_groups, kMaxGroups);
  const std::uint32_t team = threadIdx.x / kTeam;
  const std::uint32_t teams = 1u << log_teams;
  const std::uint32_t in_column = team & (teams - 1);
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * (kTeams >> log_teams) + (team >> log_teams);
  const std::int64_t count = column < columns ? chunks : 0;
  const auto of_column = of_groups + (team >> log_teams) * teams; // where there are more groups than teams, the only column
  const std::int64_t groups = ceil_divide(chunks, math::kChunk);
  for (std::int64_t group = 0; group < groups; group += teams) {
    const std::int64_t first = (group + in_column) * math::kChunk;
    const T sum = sum_chunk<T>(partials + first * columns + column, chunk_size(count, first), columns);
    if (threadIdx.x % kTeam == 0 && group + in_column < groups) {
      of_column[group + in_column] = sum;
    }
  }
  __syncthreads();
  const T sum = sum_chunk<T>(of_column, in_column == 0 ? groups : 0, 1);
  if (threadIdx.x % kTeam == 0 && in_column == 0 && column < columns) {
    sums[column] = sum / divisor;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) divide_each(T* numbers, std::int64_t numel, T divisor) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < numel) {
    numbers[i] /= divisor;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) round_each(const double* numbers, std::int64_t numel, S* rounded) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < numel) {
    math::narrow(rounded[i], numbers[i]);
  }
}

template <class T>
void finish(const T* partials, std::int64_t chunks, std::int64_t columns, std::int64_t divisor, T* sums, T* scratch,
            CUstream_st* stream) {
  std::int64_t groups = ceil_divide(chunks, math::kChunk);
  while (groups > kMaxGroups) {
    const auto blocks = static_cast<std::uint32_t>(ceil_divide(groups * columns, kTeams));
    constexpr auto kernel = sum_groups<T>;
    KL_EXT_LAUNCH_EXCHANGING(kernel, blocks, kThreads, stream, partials, chunks, columns, scratch);
    partials = scratch;
    scratch += groups * columns;
    chunks = groups;
    groups = ceil_divide(chunks, math::kChunk);
  }
  const std::int64_t teams = std::min<std::int64_t>(kTeams, next_power_of_two(groups));
  const auto blocks = static_cast<std::uint32_t>(ceil_divide(columns, kTeams / teams));
  constexpr auto kernel = sum_last<T>;
  KL_EXT_LAUNCH_EXCHANGING(kernel, blocks, kThreads, stream, partials, chunks, columns, log2_of(teams), static_cast<T>(divisor),
                           sums);
}

template <class T>
void divide_all(T* numbers, std::int64_t numel, std::int64_t divisor, CUstream_st* stream) {
  constexpr auto kernel = divide_each<T>;
  KL_EXT_LAUNCH(kernel, static_cast<std::uint32_t>(ceil_divide(numel, kThreads)), kThreads, stream, numbers, numel,
                static_cast<T>(divisor));
}

template <class S>
void round_all(const double* numbers, std::int64_t numel, void* rounded, CUstream_st* stream) {
  constexpr auto kernel = round_each<S>;
  KL_EXT_LAUNCH(kernel, static_cast<std::uint32_t>(ceil_divide(numel, kThreads)), kThreads, stream, numbers, numel,
                static_cast<S*>(rounded));
}

} // namespace

namespace kernels {

void finish_sums(const float* partials, std::int64_t chunks, std::int64_t columns, std::int64_t divisor, float* sums,
                 float* scratch, CUstream_st* stream) {
  finish(partials, chunks, columns, divisor, sums, scratch, stream);
}

void finish_sums(const double* partials, std::int64_t chunks, std::int64_t columns, std::int64_t divisor, double* sums,
                 double* scratch, CUstream_st* stream) {
  finish(partials, chunks, columns, divisor, sums, scratch, stream);
}

void divide(float* numbers, std::int64_t numel, std::int64_t divisor, CUstream_st* stream) {
  divide_all(numbers, numel, divisor, stream);
}

void divide(double* numbers, std::int64_t numel, std::int64_t divisor, CUstream_st* stream) {
  divide_all(numbers, numel, divisor, stream);
}

void round_to(Storage dtype, const double* numbers, std::int64_t numel, void* rounded, CUstream_st* stream) {
  const auto round = dtype == kFloat16 ? round_all<math::Half> : round_all<math::BFloat16>;
  round(numbers, numel, rounded, stream);
}

} // namespace kernels

} // namespace kl_ext::cuda
