// The only place that launches kernels; each kernel is a constant expression. An emulation of CUDA on the host defines the
// macros before this header is read.
#pragma once

#if !defined(KL_EXT_LAUNCH)
#include <cuda_runtime.h>
// The caller checks cudaGetLastError().
#define KL_EXT_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
// For kernels whose threads exchange numbers: by shuffles, or through an array in shared memory and barriers.
#define KL_EXT_LAUNCH_EXCHANGING KL_EXT_LAUNCH
#define KL_EXT_DEVICE __device__ __forceinline__
// An array in shared memory. Functions take its pointer as a template argument: any type that can be indexed and added to.
#define KL_EXT_SHARED(type, name, size) __shared__ type name[size]
#endif
