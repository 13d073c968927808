// The only place that launches kernels: an emulation of CUDA on the host defines the macro before this header is read.
#pragma once

#if !defined(KL_EXT_LAUNCH)
#include <cuda_runtime.h>
// Errors are for the caller's cudaGetLastError().
#define KL_EXT_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif
