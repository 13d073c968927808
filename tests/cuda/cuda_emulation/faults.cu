// Kernels with one fault each, for test_cuda_emulation_faults.py: of the line marked with it, and named by it. The last
// ones are for the sanitizers to find.
#include <cstdio>
#include <cstdlib>

#include "../../../csrc/cuda/launch.cuh"

namespace faults {

constexpr std::uint32_t kThreads = 64;
constexpr std::uint32_t kBlocks = 3;

KL_EXT_DEVICE bool is_upper() { return threadIdx.x >= kThreads / 2; }

__global__ void missing_barrier_before_read(int*) {
  KL_EXT_SHARED(int, shared, kThreads);
  shared[threadIdx.x] = 1;
  __syncthreads();
  shared[threadIdx.x] = 2;
  const int other = shared[kThreads - 1 - threadIdx.x]; // FAULT
  static_cast<void>(other);
}

__global__ void missing_barrier_before_write(int* numbers) {
  KL_EXT_SHARED(int, shared, kThreads);
  shared[threadIdx.x] = 1;
  __syncthreads();
  numbers[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
  shared[threadIdx.x] = 2; // FAULT
}

__global__ void missing_barrier_within_a_warp(int*) {
  KL_EXT_SHARED(int, shared, kThreads);
  shared[threadIdx.x] = 1;
  __syncthreads();
  shared[threadIdx.x] += 1;
  const int other = shared[threadIdx.x ^ 1]; // FAULT
  static_cast<void>(other);
}

__global__ void shuffle_for_a_barrier(int* numbers) {
  KL_EXT_SHARED(int, shared, kThreads);
  shared[threadIdx.x] = 1;
  numbers[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
  const int other = shared[threadIdx.x ^ 1]; // FAULT
  static_cast<void>(other);
}

__global__ void two_writers(int*) {
  KL_EXT_SHARED(int, shared, kThreads);
  shared[threadIdx.x / 2] = 1; // FAULT
}

__global__ void uninitialised_read(int* numbers) {
  KL_EXT_SHARED(int, shared, kThreads);
  const auto upper = shared + kThreads / 2;
  if (is_upper()) {
    shared[threadIdx.x] = 1;
  }
  __syncthreads();
  numbers[0] = threadIdx.x == 0 ? upper[-1] : 0; // FAULT
}

__global__ void read_of_another_blocks_number(int*) {
  KL_EXT_SHARED(int, shared, kThreads);
  if (blockIdx.x == 0) {
    shared[threadIdx.x] = 1;
  }
  __syncthreads();
  const int own = shared[threadIdx.x]; // FAULT
  static_cast<void>(own);
}

__global__ void read_out_of_range(int*) {
  KL_EXT_SHARED(int, shared, kThreads);
  shared[threadIdx.x] = 1;
  __syncthreads();
  const int other = shared[threadIdx.x + 1]; // FAULT
  static_cast<void>(other);
}

__global__ void read_below_range(int*) {
  KL_EXT_SHARED(int, shared, kThreads);
  shared[threadIdx.x] = 1;
  __syncthreads();
  const int other = shared[static_cast<int>(threadIdx.x) - 1]; // FAULT
  static_cast<void>(other);
}

__global__ void write_out_of_range(int*) {
  KL_EXT_SHARED(int, shared, kThreads / 2);
  shared[threadIdx.x] = 1; // FAULT
}

__global__ void divergent_barrier(int*) {
  if (is_upper()) {
    __syncthreads();
  } else {
    __syncthreads(); // FAULT
  }
}

__global__ void barrier_after_some_return(int*) {
  if (threadIdx.x == kThreads - 1) {
    return;
  }
  __syncthreads(); // FAULT
}

__global__ void barrier_more_for_some(int*) {
  for (std::uint32_t i = 0; i < 1 + threadIdx.x % 2; ++i) {
    __syncthreads(); // FAULT
  }
}

__global__ void barrier_while_some_shuffle(int* numbers) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads(); // FAULT
  } else {
    numbers[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 2);
  }
}

__global__ void barrier_in_a_plain_launch(int*) {
  __syncthreads(); // FAULT
}

__global__ void divergent_shuffle(int* numbers) {
  if (threadIdx.x % 2 == 0) {
    numbers[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
  } else {
    numbers[threadIdx.x] = __shfl_xor_sync(0xffffffff, 2, 1); // FAULT
  }
}

__global__ void divergent_lanes(int* numbers) {
  numbers[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1 + threadIdx.x % 2); // FAULT
}

__global__ void shuffle_after_some_return(int* numbers) {
  if (threadIdx.x >= 40) {
    return;
  }
  numbers[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1); // FAULT
}

__global__ void shuffle_of_part_of_a_warp(int* numbers) {
  if (threadIdx.x % 32 < 16) {
    numbers[threadIdx.x] = __shfl_xor_sync(0xffff, 1, 1); // FAULT
  }
}

template <class T>
__global__ void shuffle_beyond_a_warp(int* numbers) {
  numbers[threadIdx.x] = static_cast<int>(__shfl_xor_sync(0xffffffff, T(1), 32)); // FAULT
}

__global__ void nothing(int* numbers) {
  KL_EXT_SHARED(int, shared, kThreads);
  int sum = static_cast<int>(threadIdx.x);
  for (std::uint32_t half = kThreads / 2; half >= 32; half /= 2) {
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    sum += shared[threadIdx.x ^ half];
  }
  for (std::uint32_t half = 16; half > 0; half /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, half);
  }
  numbers[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void global_write_out_of_range(int* numbers) {
  numbers[blockIdx.x * kThreads + threadIdx.x + 1] = 1; // SANITIZED
}

__global__ void global_read_out_of_range(int* numbers) {
  const std::uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  numbers[i] = numbers[2 * i]; // SANITIZED
}

struct alignas(16) Vector {
  int values[4];
};

__global__ void misaligned_vector(int* numbers) {
  if (threadIdx.x == 0) {
    *reinterpret_cast<Vector*>(numbers + 1) = {}; // SANITIZED
  }
}

__global__ void signed_overflow(int* numbers) {
  numbers[threadIdx.x] = 0x7fffffff;
  numbers[threadIdx.x] += 1; // SANITIZED
}

template <auto kernel>
void run() {
  std::vector<int> numbers(kBlocks * kThreads);
  if constexpr (kernel == barrier_in_a_plain_launch) {
    KL_EXT_LAUNCH(kernel, kBlocks, kThreads, nullptr, numbers.data());
  } else {
    KL_EXT_LAUNCH_EXCHANGING(kernel, kBlocks, kThreads, nullptr, numbers.data());
  }
  for (const int number : numbers) {
    std::printf("%d ", number);
  }
}

template <auto... kernels>
int run_by_name(const std::string& name) {
  int found = 0;
  ((kl_ext::emulation::name_of<kernels>().rfind("faults::" + name, 0) == 0 ? (run<kernels>(), ++found) : 0), ...);
  return found;
}

} // namespace faults

// faults KERNEL ORDER SEED
int main(int, char** arguments) {
  using namespace faults;
  kl_ext::emulation::set_order(std::atoi(arguments[2]), static_cast<std::uint32_t>(std::atoi(arguments[3])));
  try {
    return 1 -
           run_by_name<missing_barrier_before_read, missing_barrier_before_write, missing_barrier_within_a_warp,
                       shuffle_for_a_barrier, two_writers, uninitialised_read, read_of_another_blocks_number, read_out_of_range,
                       read_below_range, write_out_of_range, divergent_barrier, barrier_after_some_return,
                       barrier_more_for_some, barrier_while_some_shuffle, barrier_in_a_plain_launch, divergent_shuffle,
                       divergent_lanes, shuffle_after_some_return, shuffle_of_part_of_a_warp, shuffle_beyond_a_warp<float>,
                       nothing, global_write_out_of_range, global_read_out_of_range, misaligned_vector, signed_overflow>(
               arguments[1]);
  } catch (const kl_ext::emulation::Fault& fault) {
    std::fprintf(stderr, "%s\n", fault.what());
    return 2;
  }
}
