// The emulated kernels for test_cuda_emulation.py, through ctypes.
#include <algorithm>
#include <map>
#include <string>

#include "cuda/sum_layout.h"
#include "driver.h"

using namespace kl_ext;

namespace {

// In functions: what enters them is initialised in any order.
std::map<std::string, emulation::Launch>& elementwise() {
  static std::map<std::string, emulation::Launch> all;
  return all;
}

std::map<std::string, emulation::LaunchSum>& sums() {
  static std::map<std::string, emulation::LaunchSum> all;
  return all;
}

// Operands in the order of csrc/cuda/kernels.h: data, dtypes, and for each the strides of every dimension.
cuda::Iteration to_iteration(int ndim, const std::int64_t* sizes, int operands, char* const* data, const int* dtypes,
                             const std::int64_t* strides) {
  cuda::Iteration iteration;
  iteration.ndim = ndim;
  iteration.operands = operands;
  for (int dim = 0; dim < ndim; ++dim) {
    iteration.sizes[dim] = sizes[dim];
  }
  for (int i = 0; i < operands; ++i) {
    iteration.operand[i].data = data[i];
    iteration.operand[i].dtype = static_cast<cuda::Storage>(dtypes[i]);
    for (int dim = 0; dim < ndim; ++dim) {
      iteration.operand[i].strides[dim] = strides[i * ndim + dim];
    }
  }
  return iteration;
}

std::string fault;

// The number of launches, up to `most` of whose grids are left in `grids`; -1 if a thread was at fault.
template <class Run>
int report(std::uint32_t last_blocks, std::uint32_t* grids, int most, const Run& run) {
  emulation::launched.clear();
  emulation::last_blocks = last_blocks;
  try {
    run();
  } catch (const emulation::Fault& thrown) {
    fault = thrown.what();
    return -1;
  }
  const int launches = static_cast<int>(emulation::launched.size());
  for (int i = 0; i < launches && i < most; ++i) {
    grids[i] = emulation::launched[i];
  }
  return launches;
}

} // namespace

bool emulation::enter(const char* name, Launch launch) { return elementwise().emplace(name, launch).second; }

bool emulation::enter(const char* name, LaunchSum launch) { return ::sums().emplace(name, launch).second; }

// Said of the last fault.
extern "C" const char* last_fault() { return fault.c_str(); }

extern "C" void set_order(int order, std::uint32_t seed) { emulation::set_order(order, seed); }

extern "C" void set_indices(std::int64_t indices) { emulation::indices = indices; }

extern "C" void set_few_threads(std::int64_t threads) { emulation::few_threads = threads; }

extern "C" void set_preparing_threads(std::int64_t threads) { emulation::preparing_threads = threads; }

// settings: low, high, scale and offset.
extern "C" int run(const char* kernel, int ndim, const std::int64_t* sizes, int operands, char* const* data, const int* dtypes,
                   const std::int64_t* strides, const double* settings, std::uint32_t last_blocks, std::uint32_t* grids,
                   int most) {
  const cuda::Iteration iteration = to_iteration(ndim, sizes, operands, data, dtypes, strides);
  return report(last_blocks, grids, most,
                [&] { elementwise().at(kernel)(iteration, {settings[0], settings[1], settings[2], settings[3]}, nullptr); });
}

cuda::SumResults to_results(int count, void* const* sums, const int* dtypes) {
  cuda::SumResults results{};
  for (int i = 0; i < count; ++i) {
    results.data[i] = sums[i];
    results.dtype[i] = static_cast<cuda::Storage>(dtypes[i]);
  }
  return results;
}

// Dimensions are the logical shape's, the last first, with a flag for each that is reduced; an output is summed if it has a
// flag.
extern "C" int run_sum(const char* kernel, int ndim, const std::int64_t* sizes, const bool* reduced, int operands,
                       char* const* data, const int* dtypes, const std::int64_t* strides, const bool* summed,
                       std::int64_t divisor, const double* settings, void* const* sums, const int* sum_dtypes,
                       std::uint32_t last_blocks, std::uint32_t* grids, int most) {
  cuda::Summation summation;
  summation.terms = to_iteration(ndim, sizes, operands, data, dtypes, strides);
  std::copy_n(reduced, ndim, summation.reduced);
  std::copy_n(summed, cuda::kMaxOutputs, summation.summed);
  summation.divisor = divisor;
  std::vector<double> scratch(static_cast<std::size_t>(cuda::scratch_numel(summation)));
  const cuda::SumResults results =
      to_results(static_cast<int>(std::count(summed, summed + cuda::kMaxOutputs, true)), sums, sum_dtypes);
  return report(last_blocks, grids, most, [&] {
    ::sums().at(kernel)(summation, {settings[0], settings[1], settings[2], settings[3]}, results, scratch.data(), nullptr);
  });
}

template <class T>
void finish(const void* numbers, cuda::Partials partials, std::int64_t sums, std::int64_t divisor,
            const cuda::SumResults& results) {
  std::vector<T> scratch(static_cast<std::size_t>(partials.count * sums));
  cuda::kernels::finish_sums(static_cast<const T*>(numbers), partials, 1, sums, divisor, results, scratch.data(), nullptr);
}

extern "C" int finish_sums(bool is_double, const void* numbers, std::int64_t count, bool are_lanes, std::int64_t sums,
                           std::int64_t divisor, void* result, int dtype, std::uint32_t* grids, int most) {
  return report(~0u, grids, most, [&] {
    (is_double ? finish<double> : finish<float>)(numbers, {count, are_lanes}, sums, divisor, to_results(1, &result, &dtype));
  });
}

extern "C" int divide(int dtype, const void* numbers, std::int64_t numel, std::int64_t divisor, bool is_double,
                      void* quotients) {
  const auto storage = static_cast<cuda::Storage>(dtype);
  return report(~0u, nullptr, 0, [&] {
    is_double ? cuda::kernels::divide(numbers, storage, numel, divisor, static_cast<double*>(quotients), nullptr)
              : cuda::kernels::divide(numbers, storage, numel, divisor, static_cast<float*>(quotients), nullptr);
  });
}

extern "C" std::uint32_t quotient(std::uint32_t dividend, std::uint32_t divisor) {
  return cuda::Divider(divisor).quotient(dividend);
}
