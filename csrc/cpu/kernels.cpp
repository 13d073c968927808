// The loops, compiled once per instruction set: KL_EXT_CPU_CAPABILITY names it. The compiler vectorises them; contraction and
// fast-math stay off, so the arithmetic is as math/ writes it on every instruction set. The loops here go term by term; sums.h
// and numbers.h have the others.
#include "kernels.h"

#include "numbers.h"
#include "sums.h"
#include "terms.h"

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

template <class F, Range range, class S>
void forward(const Block& block, Settings given) {
  using T = typename ArithmeticOf<S>::Type;
  const math::Settings<T> settings = to_settings<T>(given);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const Inputs<F, S> inputs(block, 1, row);
    S* const result = row_of<S>(block, 0, row);
    for_each_group<S>(block.columns, [&]<int kNumbers>(Count<kNumbers>, std::int64_t i) KL_EXT_INLINE_LAMBDA {
      T terms[kNumbers];
      compute_terms<F, range>(terms, inputs, i, settings);
      KL_EXT_UNROLL
      for (auto& term : terms) {
        term = F::result(term, settings);
      }
      write_group(result + i, terms);
    });
  }
}

// grad(row)(numbers, i) reads grad_output; the inputs are the operands from first_input on.
template <class F, Range range, class S, class Grad>
KL_EXT_INLINE void backward_of(const Block& block, const Grad& grad, int first_input, Settings given) {
  using T = typename ArithmeticOf<S>::Type;
  const math::Settings<T> settings = to_settings<T>(given);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const Inputs<F, S> inputs(block, first_input, row);
    const auto grad_of_row = grad(row);
    S* results[F::kGradients];
    for (int input = 0; input < F::kGradients; ++input) {
      results[input] = row_of<S>(block, input, row);
    }
    for_each_group<S>(block.columns, [&]<int kNumbers>(Count<kNumbers>, std::int64_t i) KL_EXT_INLINE_LAMBDA {
      T grads[kNumbers];
      T values[kNumbers][F::kInputs];
      T gradients[F::kGradients][kNumbers];
      grad_of_row(grads, i);
      inputs.read(values, i);
      KL_EXT_UNROLL
      for (int n = 0; n < kNumbers; ++n) {
        T gradient[F::kGradients];
        F::template backward<range>(grads[n], values[n], settings, gradient);
        KL_EXT_UNROLL
        for (int input = 0; input < F::kGradients; ++input) {
          gradients[input][n] = gradient[input];
        }
      }
      KL_EXT_UNROLL
      for (int input = 0; input < F::kGradients; ++input) {
        write_group(results[input] + i, gradients[input]);
      }
    });
  }
}

template <class F, Range range, class S>
void backward(const Block& block, Settings given) {
  const auto grad = [&](std::int64_t row) {
    return [data = row_of<const S>(block, F::kGradients, row)](auto& numbers, std::int64_t i)
               KL_EXT_INLINE_LAMBDA { read_group(numbers, data + i); };
  };
  backward_of<F, range, S>(block, grad, F::kGradients + 1, given);
}

template <class F, Range range, class S>
void backward_of_one(const Block& block, double grad_output, Settings given) {
  using T = typename ArithmeticOf<S>::Type;
  const T any_nan = static_cast<T>(__builtin_nan("")); // its lower bits are 0, as write_group requires
  const T one = grad_output == grad_output ? static_cast<T>(grad_output) : any_nan;
  const auto grad = [one](std::int64_t) {
    return [one](auto& numbers, std::int64_t) KL_EXT_INLINE_LAMBDA {
      KL_EXT_UNROLL
      for (auto& number : numbers) {
        number = one;
      }
    };
  };
  backward_of<F, range, S>(block, grad, F::kGradients, given);
}

// F takes precomputed values of q, whose gradients are the last two.
template <class F, Range range, class T>
void backward_to_lanes(const Block& block, void* lanes_of_mu, void* lanes_of_log_var, int lanes, double grad_output,
                       Settings given) {
  constexpr int kOfP = 2;
  const math::Settings<T> settings = to_settings<T>(given);
  const T grad = static_cast<T>(grad_output);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const Inputs<F, T> inputs(block, kOfP, row);
    const std::int64_t first_of_lane = row % lanes * block.columns;
    T* const grad_mu_p = row_of<T>(block, 0, row);
    T* const grad_log_var_p = row_of<T>(block, 1, row);
    T* const grad_mu_q = static_cast<T*>(lanes_of_mu) + first_of_lane;
    T* const grad_log_var_q = static_cast<T*>(lanes_of_log_var) + first_of_lane;
    KL_EXT_LOOP
    for (std::int64_t i = 0; i < block.columns; ++i) {
      T values[1][F::kInputs];
      T gradient[F::kGradients];
      inputs.read(values, i);
      F::template backward<range>(grad, values[0], settings, gradient);
      grad_mu_p[i] = gradient[0];
      grad_log_var_p[i] = gradient[1];
      grad_mu_q[i] += gradient[2];
      grad_log_var_q[i] += gradient[3];
    }
  }
}

template <class GivenQ, bool forward, class T>
void prepare_q(void* out, const void* log_var_q, std::int64_t numel, Settings given) {
  const math::Settings<T> settings = to_settings<T>(given);
  KL_EXT_LOOP
  for (std::int64_t i = 0; i < numel; ++i) {
    static_cast<T*>(out)[i] = GivenQ::template prepared<forward>(static_cast<const T*>(log_var_q)[i], settings);
  }
}

// The tables of kernels.h.

// Kernels on numbers of the arithmetic type. With a mask that is read as bools there are only sums.
template <class F, Range range, class T>
constexpr void add_arithmetic(FormulaKernels& kernels, Storage storage, Arithmetic arithmetic) {
  constexpr bool kWide = range == Range::kWide;
  kernels.sum_chunks[kWide][storage] = sum_chunks<F, range, T>;
  kernels.sum_row_chunks[kWide][storage] = sum_row_chunks<F, range, T>;
  if constexpr (!F::kIsMasked) {
    kernels.forward[kWide][storage] = forward<F, range, T>;
    kernels.accumulate[kWide][arithmetic] = accumulate<F, range, T>;
  }
  if constexpr (!F::kIsMasked && F::kGradients > 0) {
    kernels.backward[kWide][storage] = backward<F, range, T>;
  }
}

template <class F, class T>
constexpr void add_given_q(FormulaKernels& kernels, Arithmetic arithmetic) {
  using Given = typename F::GivenQ;
  constexpr Range kNarrow = Range::kNarrow;
  kernels.sum_chunks_given_q[arithmetic] = sum_chunks<Given, kNarrow, T>;
  kernels.sum_row_chunks_given_q[arithmetic] = sum_row_chunks<Given, kNarrow, T>;
  if constexpr (!F::kIsMasked) {
    kernels.forward_given_q[arithmetic] = forward<Given, kNarrow, T>;
    kernels.backward_given_q[arithmetic] = backward<Given, kNarrow, T>;
    kernels.accumulate_given_q[arithmetic] = accumulate<Given, kNarrow, T>;
  }
}

// Kernels on rows of tensors, of any dtype.
template <class F, Range range, class S>
constexpr void add_rows(FormulaKernels& kernels, Storage storage) {
  constexpr bool kWide = range == Range::kWide;
  kernels.forward[kWide][storage] = forward<F, range, S>;
  kernels.backward[kWide][storage] = backward<F, range, S>;
  kernels.backward_of_one[kWide][storage] = backward_of_one<F, range, S>;
  kernels.sum_chunks[kWide][storage] = sum_chunks<F, range, S>;
  kernels.sum_row_chunks[kWide][storage] = sum_row_chunks<F, range, S>;
}

template <class F, class T>
constexpr void add_rows_given_q(FormulaKernels& kernels, Arithmetic arithmetic) {
  using Given = typename F::GivenQ;
  constexpr Range kNarrow = Range::kNarrow;
  kernels.backward_to_lanes[arithmetic] = backward_to_lanes<Given, kNarrow, T>;
  kernels.prepare_q[arithmetic] = prepare_q<Given, true, T>;
  kernels.prepare_q_of_backward[arithmetic] = prepare_q<Given, false, T>;
}

template <class F>
constexpr FormulaKernels kernels_of() {
  FormulaKernels kernels{};
  add_arithmetic<F, Range::kWide, float>(kernels, kFloat32, kSingle);
  add_arithmetic<F, Range::kWide, double>(kernels, kFloat64, kDouble);
  if constexpr (F::kRanges) {
    add_arithmetic<F, Range::kNarrow, float>(kernels, kFloat32, kSingle);
    add_arithmetic<F, Range::kNarrow, double>(kernels, kFloat64, kDouble);
  }
  if constexpr (!std::is_void_v<typename F::GivenQ>) {
    add_given_q<F, float>(kernels, kSingle);
    add_given_q<F, double>(kernels, kDouble);
  }
  return kernels;
}

template <class F, Range range>
constexpr void add_all_rows(FormulaKernels& kernels) {
  add_rows<F, range, math::Half>(kernels, kFloat16);
  add_rows<F, range, math::BFloat16>(kernels, kBFloat16);
  add_rows<F, range, float>(kernels, kFloat32);
  add_rows<F, range, double>(kernels, kFloat64);
}

template <class F>
constexpr FormulaKernels kernels_with_rows_of() {
  FormulaKernels kernels = kernels_of<F>();
  add_all_rows<F, Range::kWide>(kernels);
  if constexpr (F::kRanges) {
    add_all_rows<F, Range::kNarrow>(kernels);
  }
  if constexpr (!std::is_void_v<typename F::GivenQ>) {
    add_rows_given_q<F, float>(kernels, kSingle);
    add_rows_given_q<F, double>(kernels, kDouble);
  }
  return kernels;
}

template <class S>
constexpr void add_storage(Kernels& kernels, Storage storage) {
  kernels.load[storage][kSingle] = load<S, float>;
  kernels.load[storage][kDouble] = load<S, double>;
  if constexpr (!std::is_same_v<S, math::Bool>) {
    kernels.store[storage][kSingle] = store<S, float>;
    kernels.store[storage][kDouble] = store<S, double>;
  }
}

template <class T>
constexpr void add_numbers(Kernels& kernels, Arithmetic arithmetic) {
  kernels.add_to_lanes[arithmetic] = add_to_lanes<T>;
  kernels.fold_lanes[arithmetic] = fold_lanes<T>;
  kernels.sum_rows[arithmetic] = sum_rows<T>;
  kernels.divide[arithmetic] = divide<T>;
}

template <class... F>
constexpr Kernels all_kernels(math::FormulaList<F...>) {
  Kernels kernels{};
  const FormulaKernels alone[] = {kernels_with_rows_of<F>()..., kernels_of<math::Weight>()};
  const FormulaKernels weighted[] = {kernels_of<math::Weighted<F>>()...};
  const FormulaKernels masked[] = {kernels_of<math::Masked<F>>()...};
  for (std::size_t i = 0; i < sizeof...(F); ++i) {
    kernels.formulas[i] = alone[i];
    kernels.weighted[i] = weighted[i];
    kernels.masked[i] = masked[i];
  }
  kernels.formulas[sizeof...(F)] = alone[sizeof...(F)];
  add_storage<math::Half>(kernels, kFloat16);
  add_storage<math::BFloat16>(kernels, kBFloat16);
  add_storage<float>(kernels, kFloat32);
  add_storage<double>(kernels, kFloat64);
  add_storage<math::Bool>(kernels, kBool);
  add_numbers<float>(kernels, kSingle);
  add_numbers<double>(kernels, kDouble);
  return kernels;
}

} // namespace

constinit const Kernels kernels = all_kernels(math::Formulas());

} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
