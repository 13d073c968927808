// The loops of the formulas, and the tables of all; compiled once per instruction set: KL_EXT_CPU_CAPABILITY names it. The compiler
// vectorises them (contraction and fast-math stay off: the arithmetic is what math/ writes, on every instruction set the same).
#include "kernels.h"

#include "../math/gaussian.h"
#include "../math/summation.h"
#include "groups.h"
#include "numbers.h"

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

using math::Range;

template <class T>
math::Clamp<T> to_clamp(Bounds bounds) {
  return {static_cast<T>(bounds.low), static_cast<T>(bounds.high)};
}

// A row of an operand.
template <class S>
KL_EXT_INLINE S* row_of(const Block& block, int operand, std::int64_t row) {
  return reinterpret_cast<S*>(static_cast<char*>(block.pointers[operand]) + row * block.row_strides[operand]);
}

// What the loops read: the numbers of each input, in the arithmetic type.
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

  template <int kNumbers>
  KL_EXT_INLINE void read(T (&values)[kNumbers][Loss::kInputs], std::int64_t i) const {
    KL_EXT_UNROLL
    for (int input = 0; input < Loss::kInputs; ++input) {
      T numbers[kNumbers];
      read_group(numbers, data[input] + i);
      const bool is_clamped_bits = sizeof(S) == 2 && input % 2 == 1; // log-variances
      KL_EXT_UNROLL
      for (int n = 0; n < kNumbers; ++n) {
        values[n][input] = is_clamped_bits ? detached(numbers[n]) : numbers[n];
      }
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
  Detached<T> detached;
};

// The terms of the inputs from number i on.
template <class Loss, Range range, int kNumbers, class S, class T>
KL_EXT_INLINE void compute_terms(T (&terms)[kNumbers], const Inputs<Loss, S>& inputs, std::int64_t i,
                                 const math::Clamp<T>& clamp) {
  T values[kNumbers][Loss::kInputs];
  inputs.read(values, i);
  KL_EXT_UNROLL
  for (int n = 0; n < kNumbers; ++n) {
    terms[n] = Loss::template forward<range>(values[n], clamp);
  }
}

template <class Loss, Range range, class S>
void forward(const Block& block, Bounds bounds) {
  using T = typename ArithmeticOf<S>::Type;
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const Inputs<Loss, S> inputs(block, 1, row);
    S* const result = row_of<S>(block, 0, row);
    for_each_group<S>(block.columns, [&]<int kNumbers>(Count<kNumbers>, std::int64_t i) KL_EXT_INLINE_LAMBDA {
      T terms[kNumbers];
      compute_terms<Loss, range>(terms, inputs, i, clamp);
      write_group(result + i, terms);
    });
  }
}

// grad(row)(numbers, i): those of grad_output; the inputs are the operands from first_input on.
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
    for_each_group<S>(block.columns, [&]<int kNumbers>(Count<kNumbers>, std::int64_t i) KL_EXT_INLINE_LAMBDA {
      T grads[kNumbers];
      T values[kNumbers][Loss::kInputs];
      T gradients[Loss::kGradients][kNumbers];
      grad_of_row(grads, i);
      inputs.read(values, i);
      KL_EXT_UNROLL
      for (int n = 0; n < kNumbers; ++n) {
        T gradient[Loss::kGradients];
        Loss::template backward<range>(grads[n], values[n], clamp, gradient);
        KL_EXT_UNROLL
        for (int input = 0; input < Loss::kGradients; ++input) {
          gradients[input][n] = gradient[input];
        }
      }
      KL_EXT_UNROLL
      for (int input = 0; input < Loss::kGradients; ++input) {
        write_group(results[input] + i, gradients[input]);
      }
    });
  }
}

template <class Loss, Range range, class S>
void backward(const Block& block, Bounds bounds) {
  const auto grad = [&](std::int64_t row) {
    return [data = row_of<const S>(block, Loss::kGradients, row)](auto& numbers, std::int64_t i)
               KL_EXT_INLINE_LAMBDA { read_group(numbers, data + i); };
  };
  backward_of<Loss, range, S>(block, grad, Loss::kGradients + 1, bounds);
}

template <class Loss, Range range, class S>
void backward_of_one(const Block& block, double grad_output, Bounds bounds) {
  const auto grad = [one = static_cast<typename ArithmeticOf<S>::Type>(grad_output)](std::int64_t) {
    return [one](auto& numbers, std::int64_t) KL_EXT_INLINE_LAMBDA {
      KL_EXT_UNROLL
      for (auto& number : numbers) {
        number = one;
      }
    };
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
      T values[1][Loss::kInputs];
      T gradient[Loss::kGradients];
      inputs.read(values, i);
      Loss::template backward<range>(grad, values[0], clamp, gradient);
      grad_mu_p[i] = gradient[0];
      grad_log_var_p[i] = gradient[1];
      grad_mu_q[i] += gradient[2];
      grad_log_var_q[i] += gradient[3];
    }
  }
}

// The lanes of a sum, where the loops keep them: those that numbers with the same place in a group go to lie beside each other.
template <class S>
constexpr int kLanesOfPlace = math::kLanes / kGroup<S>;

// Adds the terms of at most a turn of contiguous inputs to the lanes `first` and on, which is the first of a group.
template <class Loss, Range range, class S, class T>
KL_EXT_INLINE void add_groups(T* lanes, int first, const Inputs<Loss, S>& inputs, std::int64_t numel,
                              const math::Clamp<T>& clamp) {
  T* const into = lanes + first / kGroup<S>;
  for_each_group<S>(numel, [&]<int kNumbers>(Count<kNumbers>, std::int64_t i) KL_EXT_INLINE_LAMBDA {
    T terms[kNumbers];
    compute_terms<Loss, range>(terms, inputs, i, clamp);
    KL_EXT_UNROLL
    for (int n = 0; n < kNumbers; ++n) {
      into[n * kLanesOfPlace<S> + i / kGroup<S>] += terms[n];
    }
  });
}

// Adds a term to each lane.
template <class Loss, Range range, class S, class T>
KL_EXT_INLINE void add_turn(T* lanes, const Inputs<Loss, S>& inputs, const math::Clamp<T>& clamp) {
  add_groups<Loss, range>(lanes, 0, inputs, math::kLanes, clamp);
}

// Adds the terms of contiguous inputs to the lanes `first` and on.
template <class Loss, Range range, class S, class T>
KL_EXT_INLINE void accumulate_row(T* lanes, const Inputs<Loss, S>& inputs, int first, std::int64_t numel,
                                  const math::Clamp<T>& clamp) {
  std::int64_t i = 0;
  if (const int place = first % kGroup<S>; place != 0) { // the rest of a group
    T terms[1];
    compute_terms<Loss, range>(terms, inputs, 0, clamp);
    lanes[place * kLanesOfPlace<S> + first / kGroup<S>] += terms[0];
    first = (first + 1) % math::kLanes;
    i = 1;
  }
  if (first > 0) {
    const std::int64_t run = numel - i < math::kLanes - first ? numel - i : math::kLanes - first;
    add_groups<Loss, range>(lanes, first, inputs.from(i), run, clamp);
    i += run;
  }
  for (; i + math::kLanes <= numel; i += math::kLanes) {
    add_turn<Loss, range>(lanes, inputs.from(i), clamp);
  }
  add_groups<Loss, range>(lanes, 0, inputs.from(i), numel - i, clamp);
}

template <class Loss, Range range, class T>
void accumulate(void* lanes, const void* const* inputs, int first, std::int64_t numel, Bounds bounds) {
  accumulate_row<Loss, range>(static_cast<T*>(lanes), Inputs<Loss, T>(inputs), first, numel, to_clamp<T>(bounds));
}

// In the order of math/summation.h: the lanes of each place among themselves, and at last those that are left.
template <class S, class T>
KL_EXT_INLINE T fold(T (&lanes)[math::kLanes]) {
  T sums[kGroup<S>];
  for (int n = 0; n < kGroup<S>; ++n) {
    T* const of_place = lanes + n * kLanesOfPlace<S>;
    math::fold_lanes(of_place, kLanesOfPlace<S>, 1);
    sums[n] = of_place[0];
  }
  math::fold_lanes(sums, kGroup<S>, 1);
  return sums[0];
}

// The terms of a block, row after row from a given one on.
template <class Loss, Range range, class S>
class Terms {
 public:
  using T = typename ArithmeticOf<S>::Type;

  KL_EXT_INLINE Terms(const Block& block, std::int64_t begin, Bounds bounds)
      : block_(block), clamp_(to_clamp<T>(bounds)), row_(begin / block.columns), column_(begin % block.columns) {}

  // Adds the next terms to lanes. Where rows consist of whole turns, so does every chunk, and the lanes stay in registers.
  KL_EXT_INLINE void add_to(T* lanes, std::int64_t numel) {
    if (block_.columns % math::kLanes == 0) {
      for (std::int64_t done = 0; done < numel; done += math::kLanes) {
        add_turn<Loss, range>(lanes, next(math::kLanes), clamp_);
      }
    } else {
      for (std::int64_t done = 0; done < numel;) {
        const std::int64_t left = block_.columns - column_;
        const std::int64_t run = numel - done < left ? numel - done : left;
        accumulate_row<Loss, range>(lanes, next(run), done % math::kLanes, run, clamp_);
        done += run;
      }
    }
  }

 private:
  // The inputs of the next terms, which must be those of one row.
  KL_EXT_INLINE Inputs<Loss, S> next(std::int64_t numel) {
    const Inputs<Loss, S> inputs(block_, 0, row_, column_);
    column_ += numel;
    row_ += column_ == block_.columns ? 1 : 0;
    column_ = column_ == block_.columns ? 0 : column_;
    return inputs;
  }

  const Block& block_;
  math::Clamp<T> clamp_;
  std::int64_t row_;
  std::int64_t column_;
};

template <class Loss, Range range, class S>
void sum_chunks(void* partials, const Block& block, std::int64_t begin, std::int64_t end, Bounds bounds) {
  using T = typename ArithmeticOf<S>::Type;
  Terms<Loss, range, S> terms(block, begin, bounds);
  T* out = static_cast<T*>(partials);
  for (std::int64_t start = begin; start < end; start += math::kChunk) {
    alignas(64) T lanes[math::kLanes] = {};
    terms.add_to(lanes, end - start < math::kChunk ? end - start : math::kChunk);
    *out++ = fold<S>(lanes);
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
