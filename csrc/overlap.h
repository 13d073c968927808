// Whether two strided tensors of one storage share memory, decided exactly. torch's own check (ATen/MemoryOverlap.h) gives no
// answer for tensors with gaps, such as two halves of one tensor, and lets them pass.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>

namespace kl_ext {

enum class Overlap { kNone, kFull, kPartial };

// Where the elements of a tensor lie in its storage.
struct Placement {
  c10::IntArrayRef sizes;
  c10::IntArrayRef strides;
  int64_t offset; // in elements, like the strides
  int64_t itemsize;
};

namespace overlap {

// The multiples 0, stride, ..., (count - 1) * stride, in bytes.
struct Multiples {
  int64_t stride;
  int64_t count;

  int64_t largest() const { return stride * (count - 1); }
};

// Whether target is a sum of one multiple from each term. Strides descend, so only few multiples of the first can fit.
inline bool is_sum(c10::ArrayRef<Multiples> terms, int64_t target) {
  if (terms.empty()) {
    return target == 0;
  }
  int64_t rest = 0;
  for (const Multiples& term : terms.slice(1)) {
    rest += term.largest();
  }
  const int64_t stride = terms[0].stride;
  const int64_t first = target > rest ? (target - rest + stride - 1) / stride : 0;
  const int64_t last = target < 0 ? -1 : std::min(terms[0].count - 1, target / stride);
  for (int64_t i = first; i <= last; ++i) {
    if (is_sum(terms.slice(1), target - i * stride)) {
      return true;
    }
  }
  return false;
}

} // namespace overlap

// kFull: each element has the same memory in both. A tensor with overlapping elements shares memory with itself only partially.
inline Overlap overlap_of(const Placement& a, const Placement& b) {
  using overlap::Multiples;
  // a and b share a byte where offset_a + sum i_d stride_d = offset_b + sum j_d stride_d. Counting every j from its end brings
  // all terms to one side with a positive sign.
  c10::SmallVector<Multiples, 16> terms{{1, a.itemsize + b.itemsize - 1}};
  int64_t target = b.offset * b.itemsize - a.offset * a.itemsize + b.itemsize - 1;
  bool is_same = a.sizes == b.sizes && a.offset == b.offset && a.itemsize == b.itemsize;
  for (const Placement* const placement : {&a, &b}) {
    for (size_t d = 0; d < placement->sizes.size(); ++d) {
      const Multiples term{placement->strides[d] * placement->itemsize, placement->sizes[d]};
      if (term.count == 0) {
        return Overlap::kNone;
      }
      if (term.count == 1) {
        continue;
      }
      is_same = is_same && term.stride != 0 && a.strides[d] == b.strides[d];
      target += placement == &b ? term.largest() : 0;
      const auto alike = std::find_if(terms.begin(), terms.end(), [&](const Multiples& t) { return t.stride == term.stride; });
      if (alike != terms.end()) {
        alike->count += term.count - 1;
      } else if (term.stride != 0) {
        terms.push_back(term);
      }
    }
  }
  if (is_same) {
    return Overlap::kFull;
  }
  std::sort(terms.begin(), terms.end(),
            [](const Multiples& left, const Multiples& right) { return left.stride > right.stride; });
  return overlap::is_sum(terms, target) ? Overlap::kPartial : Overlap::kNone;
}

} // namespace kl_ext
