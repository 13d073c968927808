// Memory for results.
//
// Fresh memory costs more than the computation: the first touch of each page is a fault, and the C library returns to the
// system what one training step frees before the next step asks for it. So CPU results of 128 KiB and more reuse the memory of
// earlier results, and fresh memory of 2 MiB and more is made of huge pages, as in NumPy. The system may take back the memory
// that is kept, except for the last 64 MiB, when it runs short.
//
// Two environment variables, read when the library is loaded:
//
//   KL_EXT_KEEP_MEMORY   the most MiB to keep (512); 0: torch allocates results below 2 MiB
//   KL_EXT_HUGE_PAGES    0: ordinary pages
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

namespace kl_ext {

// Like at::empty.
at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options,
                    at::MemoryFormat format = at::MemoryFormat::Contiguous);

// Like at::empty_like.
at::Tensor allocate_like(const at::Tensor& tensor);

} // namespace kl_ext
