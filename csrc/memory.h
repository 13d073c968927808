// Where results go.
//
// Fresh memory costs more than what is computed: the first touch of each page is a fault, and the C library gives what a
// training step frees back to the system before the next step asks for it. So results of 128 KiB and more on the CPU get memory
// that an earlier one has left, and fresh memory of 2 MiB and more is of huge pages, as that of NumPy's arrays is. What is kept
// for that, but for the last 64 MiB, is the system's to take back where it runs short.
//
// Two environment variables, read when the library is loaded:
//
//   KL_EXT_KEEP_MEMORY   the most MiB that are kept (512); 0: results below 2 MiB are torch's
//   KL_EXT_HUGE_PAGES    0: ordinary pages
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

namespace kl_ext {

// As at::empty.
at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options,
                    at::MemoryFormat format = at::MemoryFormat::Contiguous);

// As at::empty_like.
at::Tensor allocate_like(const at::Tensor& tensor);

} // namespace kl_ext
