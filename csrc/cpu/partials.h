// From the sums of chunks to the final sums, in the order of math/summation.h.
#pragma once

#include "block.h"

namespace kl_ext::cpu {

// At most this many neighbouring sums are computed at once: their lanes stay in the second-level cache.
constexpr int64_t kColumns = 512;

// Sums partials[chunks], level after level, and leaves the sum in the first.
void finish_sum(char* partials, int64_t chunks, Arithmetic arithmetic);

// Sums each column of partials[chunks, columns] in the same way, and leaves the sums in the first row.
void finish_sums(char* partials, int64_t chunks, int64_t columns, Arithmetic arithmetic);

} // namespace kl_ext::cpu
