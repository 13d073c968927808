// From the sums of chunks to those of everything, in the order of math/summation.h.
#pragma once

#include "block.h"

namespace kl_ext::cpu {

// Sums beside each other are computed at most so many at once: their lanes stay in the second-level cache.
constexpr int64_t kColumns = 512;

// Sums partials[chunks], level after level; the sum is left in the first.
void finish_sum(char* partials, int64_t chunks, Arithmetic arithmetic);

// Likewise of each column of partials[chunks, columns]; the sums are left in the first row.
void finish_sums(char* partials, int64_t chunks, int64_t columns, Arithmetic arithmetic);

} // namespace kl_ext::cpu
