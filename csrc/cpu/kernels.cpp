// The loops, compiled once per instruction set: KL_EXT_CPU_CAPABILITY names it. The compiler vectorises them (contraction and
// fast-math stay off: the arithmetic is what math/ writes, on every instruction set the same).
#include "kernels.h"

#include "../math/gaussian.h"
#include "../math/half.h"
#include "../math/summation.h"

#define KL_EXT_LOOP _Pragma("GCC ivdep")

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

using math::Range;

template <class T>
math::Clamp<T> to_clamp(Bounds bounds) {
  return {static_cast<T>(bounds.low), static_cast<T>(bounds.high)};
}

template <class Loss, Range range, class T>
void forward(void* out, const void* const* inputs, std::int64_t numel, Bounds bounds) {
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  T* result = static_cast<T*>(out);
  const T* data[Loss::kInputs];
  for (int input = 0; input < Loss::kInputs; ++input) {
    data[input] = static_cast<const T*>(inputs[input]);
  }
  KL_EXT_LOOP
  for (std::int64_t i = 0; i < numel; ++i) {
    T values[Loss::kInputs];
    for (int input = 0; input < Loss::kInputs; ++input) {
      values[input] = data[input][i];
    }
    result[i] = Loss::template forward<range>(values, clamp);
  }
}

template <class Loss, Range range, class T>
void backward(void* const* gradients, const void* grad_output, const void* const* inputs, std::int64_t numel, Bounds bounds) {
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  const T* grad = static_cast<const T*>(grad_output);
  const T* data[Loss::kInputs];
  T* results[Loss::kInputs];
  for (int input = 0; input < Loss::kInputs; ++input) {
    data[input] = static_cast<const T*>(inputs[input]);
    results[input] = static_cast<T*>(gradients[input]);
  }
  KL_EXT_LOOP
  for (std::int64_t i = 0; i < numel; ++i) {
    T values[Loss::kInputs];
    T gradient[Loss::kInputs];
    for (int input = 0; input < Loss::kInputs; ++input) {
      values[input] = data[input][i];
    }
    Loss::template backward<range>(grad[i], values, clamp, gradient);
    for (int input = 0; input < Loss::kInputs; ++input) {
      results[input][i] = gradient[input];
    }
  }
}

template <class Loss, Range range, class T>
void accumulate(void* lanes, const void* const* inputs, int first, std::int64_t numel, Bounds bounds) {
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  T* into = static_cast<T*>(lanes);
  const T* data[Loss::kInputs];
  for (int input = 0; input < Loss::kInputs; ++input) {
    data[input] = static_cast<const T*>(inputs[input]);
  }
  const auto add_term = [&](int lane, std::int64_t i) __attribute__((always_inline)) { // a call would end the vectorising
    T values[Loss::kInputs];
    for (int input = 0; input < Loss::kInputs; ++input) {
      values[input] = data[input][i];
    }
    into[lane] += Loss::template forward<range>(values, clamp);
  };
  std::int64_t i = 0;
  if (first > 0) {
    const int run = static_cast<int>(numel < math::kLanes - first ? numel : math::kLanes - first);
    KL_EXT_LOOP
    for (int lane = 0; lane < run; ++lane) {
      add_term(first + lane, lane);
    }
    i = run;
  }
  for (; i + math::kLanes <= numel; i += math::kLanes) {
    KL_EXT_LOOP
    for (int lane = 0; lane < math::kLanes; ++lane) {
      add_term(lane, i + lane);
    }
  }
  KL_EXT_LOOP
  for (int lane = 0; lane < static_cast<int>(numel - i); ++lane) {
    add_term(lane, i + lane);
  }
}

template <class Loss, Range range, class T>
void sum_chunks(void* partials, const void* const* inputs, std::int64_t numel, Bounds bounds) {
  T* out = static_cast<T*>(partials);
  for (std::int64_t start = 0; start < numel; start += math::kChunk) {
    const void* data[Loss::kInputs];
    for (int input = 0; input < Loss::kInputs; ++input) {
      data[input] = static_cast<const T*>(inputs[input]) + start;
    }
    alignas(64) T lanes[math::kLanes] = {};
    accumulate<Loss, range, T>(lanes, data, 0, numel - start < math::kChunk ? numel - start : math::kChunk, bounds);
    math::fold_lanes(lanes, math::kLanes, 1);
    *out++ = lanes[0];
  }
}

template <class S, class T>
void load(void* contiguous, const void* strided, const Tile& tile) {
  T* out = static_cast<T*>(contiguous);
  for (std::int64_t row = 0; row < tile.rows; ++row, out += tile.columns) {
    const char* in = static_cast<const char*>(strided) + row * tile.row_stride;
    if (tile.column_stride == sizeof(S)) {
      const S* values = reinterpret_cast<const S*>(in);
      KL_EXT_LOOP
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        out[i] = static_cast<T>(math::widen(values[i]));
      }
    } else {
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        out[i] = static_cast<T>(math::widen(*reinterpret_cast<const S*>(in + i * tile.column_stride)));
      }
    }
  }
}

template <class S, class T>
void store(void* strided, const void* contiguous, const Tile& tile) {
  const T* in = static_cast<const T*>(contiguous);
  for (std::int64_t row = 0; row < tile.rows; ++row, in += tile.columns) {
    char* out = static_cast<char*>(strided) + row * tile.row_stride;
    if (tile.column_stride == sizeof(S)) {
      S* values = reinterpret_cast<S*>(out);
      KL_EXT_LOOP
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        math::narrow(values[i], in[i]);
      }
    } else {
      for (std::int64_t i = 0; i < tile.columns; ++i) {
        math::narrow(*reinterpret_cast<S*>(out + i * tile.column_stride), in[i]);
      }
    }
  }
}

template <class T>
void add_to_lanes(void* lanes, const void* terms, int first, std::int64_t rows, std::int64_t columns) {
  math::add_to_lanes(static_cast<T*>(lanes), static_cast<const T*>(terms), first, rows, columns);
}

template <class T>
void fold_lanes(void* lanes, int in_use, std::int64_t columns) {
  if (in_use == math::kLanes && columns == 1) {
    return math::fold_lanes(static_cast<T*>(lanes), math::kLanes, 1); // unrolled
  }
  math::fold_lanes(static_cast<T*>(lanes), in_use, columns);
}

// Rows of at most kInUse terms, a term to a lane.
template <int kInUse, class T>
void sum_short_rows(T* sums, const T* row, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i, row += columns) {
    T lanes[kInUse] = {};
    for (std::int64_t lane = 0; lane < (columns == kInUse ? kInUse : columns); ++lane) {
      lanes[lane] += row[lane];
    }
    math::fold_lanes(lanes, kInUse, 1);
    sums[i] = lanes[0];
  }
}

template <class T>
void sum_rows(void* sums, const void* terms, std::int64_t rows, std::int64_t columns) {
  T* out = static_cast<T*>(sums);
  const T* row = static_cast<const T*>(terms);
  switch (math::lanes_in_use(columns)) {
    case 1:
      return sum_short_rows<1>(out, row, rows, columns);
    case 2:
      return sum_short_rows<2>(out, row, rows, columns);
    case 4:
      return sum_short_rows<4>(out, row, rows, columns);
    case 8:
      return sum_short_rows<8>(out, row, rows, columns);
    case 16:
      return sum_short_rows<16>(out, row, rows, columns);
    case 32:
      return sum_short_rows<32>(out, row, rows, columns);
  }
  for (std::int64_t i = 0; i < rows; ++i, row += columns) {
    T lanes[math::kLanes] = {};
    math::add_to_lanes(lanes, row, 0, columns, 1);
    math::fold_lanes(lanes, math::kLanes, 1);
    out[i] = lanes[0];
  }
}

template <class T>
void divide(void* numbers, std::int64_t numel, std::int64_t divisor) {
  for (std::int64_t i = 0; i < numel; ++i) {
    static_cast<T*>(numbers)[i] /= static_cast<T>(divisor);
  }
}

} // namespace

// One row per line of the tables in kernels.h.
#define KL_EXT_BY_RANGE(function, Loss)                                                \
  {                                                                                    \
      {function<Loss, Range::kNarrow, float>, function<Loss, Range::kNarrow, double>}, \
      {function<Loss, Range::kWide, float>, function<Loss, Range::kWide, double>},     \
  }
#define KL_EXT_BY_STORAGE(function)                                        \
  {                                                                        \
      {function<math::Half, float>, function<math::Half, double>},         \
      {function<math::BFloat16, float>, function<math::BFloat16, double>}, \
      {function<float, float>, function<float, double>},                   \
      {function<double, float>, function<double, double>},                 \
  }

const Kernels kernels = {
    {KL_EXT_BY_RANGE(forward, math::SingleLoss), KL_EXT_BY_RANGE(forward, math::PairLoss),
     KL_EXT_BY_RANGE(forward, math::Divergence)},
    {KL_EXT_BY_RANGE(backward, math::SingleLoss), KL_EXT_BY_RANGE(backward, math::PairLoss),
     KL_EXT_BY_RANGE(backward, math::Divergence)},
    {KL_EXT_BY_RANGE(accumulate, math::SingleLoss), KL_EXT_BY_RANGE(accumulate, math::PairLoss),
     KL_EXT_BY_RANGE(accumulate, math::Divergence)},
    {KL_EXT_BY_RANGE(sum_chunks, math::SingleLoss), KL_EXT_BY_RANGE(sum_chunks, math::PairLoss),
     KL_EXT_BY_RANGE(sum_chunks, math::Divergence)},
    KL_EXT_BY_STORAGE(load),
    KL_EXT_BY_STORAGE(store),
    {add_to_lanes<float>, add_to_lanes<double>},
    {fold_lanes<float>, fold_lanes<double>},
    {sum_rows<float>, sum_rows<double>},
    {divide<float>, divide<double>},
};

} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
