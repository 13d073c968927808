// Sums of terms, computed on the fly, in the order of math/summation.h.
#pragma once

#include "../math/summation.h"
#include "terms.h"

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

// Lanes whose numbers have the same place in a group are stored beside each other: this many for each place.
template <class S>
constexpr int kLanesOfPlace = math::kLanes / kGroup<S>;

// Adds the terms of contiguous inputs, at most 64, to the lanes from `first` on, which is the first of a group.
template <class F, Range range, class S, class T>
KL_EXT_INLINE void add_groups(T* lanes, int first, const Inputs<F, S>& inputs, std::int64_t numel,
                              const math::Settings<T>& settings) {
  T* const into = lanes + first / kGroup<S>;
  for_each_group<S>(numel, [&]<int kNumbers>(Count<kNumbers>, std::int64_t i) KL_EXT_INLINE_LAMBDA {
    T terms[kNumbers];
    compute_terms<F, range>(terms, inputs, i, settings);
    KL_EXT_UNROLL
    for (int n = 0; n < kNumbers; ++n) {
      into[n * kLanesOfPlace<S> + i / kGroup<S>] += terms[n];
    }
  });
}

// Adds a term to each lane.
template <class F, Range range, class S, class T>
KL_EXT_INLINE void add_turn(T* lanes, const Inputs<F, S>& inputs, const math::Settings<T>& settings) {
  add_groups<F, range>(lanes, 0, inputs, math::kLanes, settings);
}

// Adds the terms of contiguous inputs to the lanes from `first` on. Not inlined: it contains the formula six times, and copying
// it into all callers would take the compiler minutes longer.
template <class F, Range range, class S, class T>
[[gnu::noinline]] void accumulate_row(T* lanes, const Inputs<F, S>& inputs, int first, std::int64_t numel,
                                      const math::Settings<T>& settings) {
  std::int64_t i = 0;
  if (const int place = first % kGroup<S>; place != 0) { // the rest of a group
    T terms[1];
    compute_terms<F, range>(terms, inputs, 0, settings);
    lanes[place * kLanesOfPlace<S> + first / kGroup<S>] += terms[0];
    first = (first + 1) % math::kLanes;
    i = 1;
  }
  if (first > 0) {
    const std::int64_t run = numel - i < math::kLanes - first ? numel - i : math::kLanes - first;
    add_groups<F, range>(lanes, first, inputs.from(i), run, settings);
    i += run;
  }
  for (; i + math::kLanes <= numel; i += math::kLanes) {
    add_turn<F, range>(lanes, inputs.from(i), settings);
  }
  add_groups<F, range>(lanes, 0, inputs.from(i), numel - i, settings);
}

template <class F, Range range, class T>
void accumulate(void* lanes, const void* const* inputs, int first, std::int64_t numel, Settings given) {
  const math::Settings<T> settings = to_settings<T>(given);
  const Inputs<F, T> all(inputs);
  T* const into = static_cast<T*>(lanes);
  const std::int64_t before = first > 0 ? math::kLanes - first : 0;
  if (numel < before + 2 * math::kLanes) {
    accumulate_row<F, range>(into, all, first, numel, settings);
    return;
  }
  if (before > 0) {
    accumulate_row<F, range>(into, all, first, before, settings);
  }
  alignas(64) T own[math::kLanes]; // stay in registers throughout
  __builtin_memcpy(own, into, sizeof(own));
  std::int64_t i = before;
  for (; i + math::kLanes <= numel; i += math::kLanes) {
    add_turn<F, range>(own, all.from(i), settings);
  }
  __builtin_memcpy(into, own, sizeof(own));
  if (i < numel) {
    accumulate_row<F, range>(into, all.from(i), 0, numel - i, settings);
  }
}

// Folds in the order of math/summation.h: first the lanes of each place, then those that are left.
template <class S, int kInUse, class T>
KL_EXT_INLINE T fold(T (&lanes)[kInUse]) {
  T sums[kGroup<S>];
  for (int n = 0; n < kGroup<S>; ++n) {
    T* const of_place = lanes + n * (kInUse / kGroup<S>);
    math::fold_lanes(of_place, kInUse / kGroup<S>, 1);
    sums[n] = of_place[0];
  }
  math::fold_lanes(sums, kGroup<S>, 1);
  return sums[0];
}

// Begins a fold, until kLeft lanes are left.
template <class S, int kLeft, class T>
KL_EXT_INLINE void begin_fold(T (&left)[kLeft], T (&lanes)[math::kLanes]) {
  constexpr int kLeftOfPlace = kLeft / kGroup<S>;
  for (int n = 0; n < kGroup<S>; ++n) {
    T* const of_place = lanes + n * kLanesOfPlace<S>;
    math::fold_lanes(of_place, kLanesOfPlace<S>, 1, kLeftOfPlace);
    for (int i = 0; i < kLeftOfPlace; ++i) {
      left[n * kLeftOfPlace + i] = of_place[i];
    }
  }
}

// The terms of a block, row by row from a given one on.
template <class F, Range range, class S>
class Terms {
 public:
  using T = typename ArithmeticOf<S>::Type;

  KL_EXT_INLINE Terms(const Block& block, std::int64_t begin, Settings given)
      : block_(block), settings_(to_settings<T>(given)), row_(begin / block.columns), column_(begin % block.columns) {}

  KL_EXT_INLINE std::int64_t left_of_row() const { return block_.columns - column_; }

  // Adds the next terms, at most a chunk, to lanes. If the row length is a multiple of 64, so is every chunk, and the lanes
  // stay in registers.
  KL_EXT_INLINE void add_to(T (&lanes)[math::kLanes], std::int64_t numel) {
    if (block_.columns % math::kLanes == 0) {
      for (std::int64_t done = 0; done < numel; done += math::kLanes) {
        add_turn<F, range>(lanes, next(math::kLanes), settings_);
      }
    } else {
      for (std::int64_t done = 0; done < numel;) {
        const std::int64_t run = numel - done < left_of_row() ? numel - done : left_of_row();
        accumulate_row<F, range>(lanes, next(run), done % math::kLanes, run, settings_);
        done += run;
      }
    }
  }

 private:
  // The inputs of the next terms, which must lie in one row.
  KL_EXT_INLINE Inputs<F, S> next(std::int64_t numel) {
    const Inputs<F, S> inputs(block_, 0, row_, column_);
    column_ += numel;
    row_ += column_ == block_.columns ? 1 : 0;
    column_ = column_ == block_.columns ? 0 : column_;
    return inputs;
  }

  const Block& block_;
  math::Settings<T> settings_;
  std::int64_t row_;
  std::int64_t column_;
};

template <class F, Range range, class S>
void sum_chunks(void* partials, const Block& block, std::int64_t begin, std::int64_t end, Settings given) {
  using T = typename ArithmeticOf<S>::Type;
  Terms<F, range, S> terms(block, begin, given);
  T* out = static_cast<T*>(partials);
  for (std::int64_t start = begin; start < end; start += math::kChunk) {
    alignas(64) T lanes[math::kLanes] = {};
    terms.add_to(lanes, end - start < math::kChunk ? end - start : math::kChunk);
    *out++ = fold<S>(lanes);
  }
}

// Folding takes as long as a short row: each step waits for the last. So the final steps of several chunks are done together.
template <class F, Range range, class S>
void sum_row_chunks(void* partials, const Block& block, std::int64_t begin, std::int64_t end, Settings given) {
  using T = typename ArithmeticOf<S>::Type;
  constexpr int kChunksAtOnce = 16;
  constexpr int kLeft = 8;
  Terms<F, range, S> terms(block, begin, given);
  T* out = static_cast<T*>(partials);
  for (std::int64_t start = begin; start < end;) {
    T left[kChunksAtOnce][kLeft];
    int chunks = 0;
    for (; chunks < kChunksAtOnce && start < end; ++chunks) {
      const std::int64_t left_of_row = terms.left_of_row();
      const std::int64_t numel = left_of_row < math::kChunk ? left_of_row : math::kChunk;
      alignas(64) T lanes[math::kLanes] = {};
      terms.add_to(lanes, numel);
      begin_fold<S>(left[chunks], lanes);
      start += numel;
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      *out++ = fold<S>(left[chunk]);
    }
  }
}

} // namespace
} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
