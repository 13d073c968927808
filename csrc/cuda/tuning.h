// The numbers that decide how sums are shared out among threads and blocks. They change no result, for the order of a sum is
// fixed (math/summation.h), only its speed; each can be given to the compiler (-D) to try another. An emulation of CUDA on the
// host makes them smaller, so that small tensors are summed like large ones.
#pragma once

// A launch that sums with at most this many threads has small blocks, so that every multiprocessor gets some.
#if !defined(KL_EXT_FEW_THREADS)
#define KL_EXT_FEW_THREADS (std::int64_t{1} << 17)
#endif

// Several threads share each lane while the launch has at most this many threads with them.
#if !defined(KL_EXT_SHARING_THREADS)
#define KL_EXT_SHARING_THREADS KL_EXT_FEW_THREADS
#endif

// The threads beside each other, which read neighbouring columns, where a block has only some lanes of a chunk.
#if !defined(KL_EXT_WIDTH_OF_PARTS)
#define KL_EXT_WIDTH_OF_PARTS 8
#endif

// The most threads that share a lane. It has at most 16 terms of a chunk.
#if !defined(KL_EXT_MOST_SHARERS)
#define KL_EXT_MOST_SHARERS 16
#endif
