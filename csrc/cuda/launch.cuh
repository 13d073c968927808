// The only place that launches kernels; each kernel is a constant expression. An emulation of CUDA on the host defines the
// macros before this header is read.
#pragma once

#if !defined(KL_EXT_LAUNCH)
#include <cuda_runtime.h>

#include <cstdint>

#include "tuning.h"
// The caller checks cudaGetLastError().
#define KL_EXT_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
// For kernels whose threads exchange numbers: by shuffles, or through an array in shared memory and barriers.
#define KL_EXT_LAUNCH_EXCHANGING KL_EXT_LAUNCH
// For kernels that exchange numbers, and read what the launch before wrote: KL_EXT_AWAIT_LAUNCH() comes before they do. With
// KL_EXT_OVERLAP they may begin before that launch has ended, the earlier if its kernel has called KL_EXT_LET_NEXT_BEGIN().
#if KL_EXT_OVERLAP == 0
#define KL_EXT_LAUNCH_AFTER KL_EXT_LAUNCH
#define KL_EXT_AWAIT_LAUNCH() static_cast<void>(0)
#else
#define KL_EXT_LAUNCH_AFTER kl_ext::cuda::launch_after
#define KL_EXT_AWAIT_LAUNCH() asm volatile("griddepcontrol.wait;" ::: "memory")
#endif
#if KL_EXT_OVERLAP < 2
#define KL_EXT_LET_NEXT_BEGIN() static_cast<void>(0)
#else
#define KL_EXT_LET_NEXT_BEGIN() asm volatile("griddepcontrol.launch_dependents;" ::: "memory")
#endif
#define KL_EXT_DEVICE __device__ __forceinline__
// Keeps an integer in registers, where the compiler would compute it again for every use, as in each turn of a loop.
#define KL_EXT_KEEP(integer) kl_ext::cuda::keep(integer)
// An array in shared memory. Functions take its pointer as a template argument: any type that can be indexed and added to.
#define KL_EXT_SHARED(type, name, size) __shared__ alignas(16) type name[size]

namespace kl_ext::cuda {

__device__ __forceinline__ void keep(std::uint32_t& integer) { asm volatile("" : "+r"(integer)); }
__device__ __forceinline__ void keep(std::int64_t& integer) { asm volatile("" : "+l"(integer)); }

template <class... Parameters, class... Arguments>
void launch_after(void (*kernel)(Parameters...), std::uint32_t blocks, std::uint32_t threads, CUstream_st* stream,
                  const Arguments&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{dim3(blocks), dim3(threads), 0, stream, &overlap, 1};
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

} // namespace kl_ext::cuda
#endif
