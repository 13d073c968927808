// The numbers that decide how work is shared out among threads, blocks and launches. They change no result, for the order of a
// sum is fixed (math/summation.h), only the speed; each can be given to the compiler (-D) to try another. An emulation of CUDA
// on the host makes them smaller, so that small tensors are summed like large ones.
#pragma once

// The threads of a block of an elementwise kernel.
#if !defined(KL_EXT_ELEMENTWISE_THREADS)
#define KL_EXT_ELEMENTWISE_THREADS 256
#endif

// How many vectors a thread of an elementwise kernel has, all of which it loads before it computes.
#if !defined(KL_EXT_ELEMENTWISE_VECTORS)
#define KL_EXT_ELEMENTWISE_VECTORS 1
#endif

// How many times 256 threads of an elementwise kernel a multiprocessor has room for, which bounds the registers of a thread. 0:
// as many as elementwise.cuh says, by the numbers that a thread holds.
#if !defined(KL_EXT_BLOCKS_PER_PROCESSOR)
#define KL_EXT_BLOCKS_PER_PROCESSOR 0
#endif

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

// Where all rows of a sum have one q, each block computes once what depends on q alone. The least threads of such a launch.
#if !defined(KL_EXT_PREPARING_THREADS)
#define KL_EXT_PREPARING_THREADS (std::int64_t{1} << 16)
#endif

// The least rows of each of its blocks.
#if !defined(KL_EXT_PREPARING_ROWS)
#define KL_EXT_PREPARING_ROWS 4
#endif

// When the launch that adds up partial sums begins: 0, once the launch before it has ended; 1, once all blocks of that one have
// ended or are about to; 2, once all of them have begun. It waits for the partial sums in any case. 1 and 2 need compute
// capability 9.0.
#if !defined(KL_EXT_OVERLAP)
#define KL_EXT_OVERLAP 0
#endif
