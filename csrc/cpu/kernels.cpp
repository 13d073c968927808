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

template <class S>
struct ArithmeticOf {
  using Type = float;
};

template <>
struct ArithmeticOf<double> {
  using Type = double;
};

template <class T>
math::Clamp<T> to_clamp(Bounds bounds) {
  return {static_cast<T>(bounds.low), static_cast<T>(bounds.high)};
}

// A row of an operand.
template <class S>
KL_EXT_INLINE S* row_of(const Block& block, int operand, std::int64_t row) {
  return reinterpret_cast<S*>(static_cast<char*>(block.pointers[operand]) + row * block.row_strides[operand]);
}

// What the loops read: a number of each input, in the arithmetic type.
template <class Loss, class S>
struct Inputs {
  using T = typename ArithmeticOf<S>::Type;

  explicit KL_EXT_INLINE Inputs(const void* const* inputs) {
    for (int input = 0; input < Loss::kInputs; ++input) {
      data[input] = static_cast<const S*>(inputs[input]);
    }
  }

  // The operands from the given one on.
  KL_EXT_INLINE Inputs(const Block& block, int operand, std::int64_t row, std::int64_t column = 0) {
    for (int input = 0; input < Loss::kInputs; ++input) {
      data[input] = row_of<const S>(block, operand + input, row) + column;
    }
  }

  KL_EXT_INLINE void read(T (&values)[Loss::kInputs], std::int64_t i) const {
    for (int input = 0; input < Loss::kInputs; ++input) {
      values[input] = math::widen(data[input][i]);
    }
  }

  KL_EXT_INLINE Inputs from(std::int64_t i) const {
    Inputs result = *this;
    for (const S*& input : result.data) {
      input += i;
    }
    return result;
  }

  const S* data[Loss::kInputs];
};

template <class Loss, Range range, class S>
void forward(const Block& block, Bounds bounds) {
  using T = typename ArithmeticOf<S>::Type;
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const Inputs<Loss, S> inputs(block, 1, row);
    S* result = row_of<S>(block, 0, row);
    KL_EXT_LOOP
    for (std::int64_t i = 0; i < block.columns; ++i) {
      T values[Loss::kInputs];
      inputs.read(values, i);
      math::narrow(result[i], Loss::template forward<range>(values, clamp));
    }
  }
}

// grad(row)(i): that of grad_output; the inputs are the operands from first_input on.
template <class Loss, Range range, class S, class Grad>
KL_EXT_INLINE void backward_of(const Block& block, const Grad& grad, int first_input, Bounds bounds) {
  using T = typename ArithmeticOf<S>::Type;
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const Inputs<Loss, S> inputs(block, first_input, row);
    const auto grad_of_row = grad(row);
    S* results[Loss::kGradients];
    for (int input = 0; input < Loss::kGradients; ++input) {
      results[input] = row_of<S>(block, input, row);
    }
    KL_EXT_LOOP
    for (std::int64_t i = 0; i < block.columns; ++i) {
      T values[Loss::kInputs];
      T gradient[Loss::kGradients];
      inputs.read(values, i);
      Loss::template backward<range>(grad_of_row(i), values, clamp, gradient);
      for (int input = 0; input < Loss::kGradients; ++input) {
        math::narrow(results[input][i], gradient[input]);
      }
    }
  }
}

template <class Loss, Range range, class S>
void backward(const Block& block, Bounds bounds) {
  const auto grad = [&](std::int64_t row) {
    return [data = row_of<const S>(block, Loss::kGradients, row)](std::int64_t i) { return math::widen(data[i]); };
  };
  backward_of<Loss, range, S>(block, grad, Loss::kGradients + 1, bounds);
}

template <class Loss, Range range, class S>
void backward_of_one(const Block& block, double grad_output, Bounds bounds) {
  const auto grad = [one = static_cast<typename ArithmeticOf<S>::Type>(grad_output)](std::int64_t) {
    return [one](std::int64_t) { return one; };
  };
  backward_of<Loss, range, S>(block, grad, Loss::kGradients, bounds);
}

// Loss: given q, which has the last two of its gradients.
template <class Loss, Range range, class T>
void backward_to_lanes(const Block& block, void* lanes_of_mu, void* lanes_of_log_var, int lanes, double grad_output,
                       Bounds bounds) {
  constexpr int kOfP = 2;
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  const T grad = static_cast<T>(grad_output);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const Inputs<Loss, T> inputs(block, kOfP, row);
    const std::int64_t first_of_lane = row % lanes * block.columns;
    T* const grad_mu_p = row_of<T>(block, 0, row);
    T* const grad_log_var_p = row_of<T>(block, 1, row);
    T* const grad_mu_q = static_cast<T*>(lanes_of_mu) + first_of_lane;
    T* const grad_log_var_q = static_cast<T*>(lanes_of_log_var) + first_of_lane;
    KL_EXT_LOOP
    for (std::int64_t i = 0; i < block.columns; ++i) {
      T values[Loss::kInputs];
      T gradient[Loss::kGradients];
      inputs.read(values, i);
      Loss::template backward<range>(grad, values, clamp, gradient);
      grad_mu_p[i] = gradient[0];
      grad_log_var_p[i] = gradient[1];
      grad_mu_q[i] += gradient[2];
      grad_log_var_q[i] += gradient[3];
    }
  }
}

// Adds a term to each lane.
template <class Loss, Range range, class S, class T>
KL_EXT_INLINE void add_turn(T* lanes, const Inputs<Loss, S>& inputs, const math::Clamp<T>& clamp) {
  KL_EXT_LOOP
  for (int lane = 0; lane < math::kLanes; ++lane) {
    T values[Loss::kInputs];
    inputs.read(values, lane);
    lanes[lane] += Loss::template forward<range>(values, clamp);
  }
}

// Adds the terms of contiguous inputs to the lanes `first` and on.
template <class Loss, Range range, class S, class T>
KL_EXT_INLINE void accumulate_row(T* lanes, const Inputs<Loss, S>& inputs, int first, std::int64_t numel,
                                  const math::Clamp<T>& clamp) {
  const auto add_term = [&](int lane, std::int64_t i) __attribute__((always_inline)) { // a call would end the vectorising
    T values[Loss::kInputs];
    inputs.read(values, i);
    lanes[lane] += Loss::template forward<range>(values, clamp);
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
    add_turn<Loss, range>(lanes, inputs.from(i), clamp);
  }
  KL_EXT_LOOP
  for (int lane = 0; lane < static_cast<int>(numel - i); ++lane) {
    add_term(lane, i + lane);
  }
}

template <class Loss, Range range, class T>
void accumulate(void* lanes, const void* const* inputs, int first, std::int64_t numel, Bounds bounds) {
  accumulate_row<Loss, range>(static_cast<T*>(lanes), Inputs<Loss, T>(inputs), first, numel, to_clamp<T>(bounds));
}

template <class Loss, Range range, class S>
void sum_chunks(void* partials, const Block& block, std::int64_t begin, std::int64_t end, Bounds bounds) {
  using T = typename ArithmeticOf<S>::Type;
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  T* out = static_cast<T*>(partials);
  const bool whole_turns = block.columns % math::kLanes == 0;
  std::int64_t row = begin / block.columns;
  std::int64_t column = begin % block.columns;
  for (std::int64_t start = begin; start < end; start += math::kChunk) {
    alignas(64) T lanes[math::kLanes] = {};
    const std::int64_t count = end - start < math::kChunk ? end - start : math::kChunk;
    for (std::int64_t done = 0; whole_turns && done < count; done += math::kLanes) { // the lanes stay in registers
      add_turn<Loss, range>(lanes, Inputs<Loss, S>(block, 0, row, column), clamp);
      column += math::kLanes;
      row += column == block.columns ? 1 : 0;
      column = column == block.columns ? 0 : column;
    }
    for (std::int64_t done = 0; !whole_turns && done < count;) {
      const std::int64_t left = block.columns - column;
      const std::int64_t run = count - done < left ? count - done : left;
      accumulate_row<Loss, range>(lanes, Inputs<Loss, S>(block, 0, row, column), done % math::kLanes, run, clamp);
      done += run;
      row += run == left ? 1 : 0;
      column = run == left ? 0 : column + run;
    }
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

template <int kTimes, class T>
void prepare_q(void* out, const void* log_var_q, std::int64_t numel, Bounds bounds) {
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  KL_EXT_LOOP
  for (std::int64_t i = 0; i < numel; ++i) {
    const T clamped = math::clamp(static_cast<const T*>(log_var_q)[i], clamp.low, clamp.high);
    static_cast<T*>(out)[i] = math::inverse_variance<kTimes>(clamped);
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
#define KL_EXT_STORAGES(function, ...)                                                                     \
  {function<__VA_ARGS__, math::Half>, function<__VA_ARGS__, math::BFloat16>, function<__VA_ARGS__, float>, \
   function<__VA_ARGS__, double>}
#define KL_EXT_ARITHMETICS(function, ...) {function<__VA_ARGS__, float>, function<__VA_ARGS__, double>}
#define KL_EXT_BY_LOSS(function, TYPES)                                                                     \
  {                                                                                                         \
      {TYPES(function, math::SingleLoss, Range::kNarrow), TYPES(function, math::SingleLoss, Range::kWide)}, \
      {TYPES(function, math::PairLoss, Range::kNarrow), TYPES(function, math::PairLoss, Range::kWide)},     \
      {TYPES(function, math::Divergence, Range::kNarrow), TYPES(function, math::Divergence, Range::kWide)}, \
  }
#define KL_EXT_GIVEN_Q(function)                                         \
  {{},                                                                   \
   KL_EXT_ARITHMETICS(function, math::PairGivenQ<true>, Range::kNarrow), \
   KL_EXT_ARITHMETICS(function, math::PairGivenQ<false>, Range::kNarrow)}
#define KL_EXT_BY_STORAGE(function)                                        \
  {                                                                        \
      {function<math::Half, float>, function<math::Half, double>},         \
      {function<math::BFloat16, float>, function<math::BFloat16, double>}, \
      {function<float, float>, function<float, double>},                   \
      {function<double, float>, function<double, double>},                 \
  }

const Kernels kernels = {
    KL_EXT_BY_LOSS(forward, KL_EXT_STORAGES),
    KL_EXT_BY_LOSS(backward, KL_EXT_STORAGES),
    KL_EXT_BY_LOSS(backward_of_one, KL_EXT_STORAGES),
    KL_EXT_BY_LOSS(accumulate, KL_EXT_ARITHMETICS),
    KL_EXT_BY_LOSS(sum_chunks, KL_EXT_STORAGES),
    KL_EXT_GIVEN_Q(forward),
    KL_EXT_GIVEN_Q(backward),
    KL_EXT_GIVEN_Q(backward_to_lanes),
    KL_EXT_GIVEN_Q(accumulate),
    KL_EXT_GIVEN_Q(sum_chunks),
    {{}, KL_EXT_ARITHMETICS(prepare_q, 1), KL_EXT_ARITHMETICS(prepare_q, 1)},
    {{}, KL_EXT_ARITHMETICS(prepare_q, 2), KL_EXT_ARITHMETICS(prepare_q, 1)},
    KL_EXT_BY_STORAGE(load),
    KL_EXT_BY_STORAGE(store),
    {add_to_lanes<float>, add_to_lanes<double>},
    {fold_lanes<float>, fold_lanes<double>},
    {sum_rows<float>, sum_rows<double>},
    {divide<float>, divide<double>},
};

} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
