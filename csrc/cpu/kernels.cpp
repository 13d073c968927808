// The loops, compiled once per instruction set: KL_EXT_CPU_CAPABILITY names it. The compiler vectorises them (contraction and
// fast-math stay off: the arithmetic is what math/ writes, on every instruction set the same). Those here go
// term by term; sums.h and numbers.h have the others.
#include "kernels.h"

#include "numbers.h"
#include "sums.h"
#include "terms.h"

namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY {
namespace {

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
  using T = typename ArithmeticOf<S>::Type;
  const T any_nan = static_cast<T>(__builtin_nan("")); // whose lower bits write_group can do without
  const T one = grad_output == grad_output ? static_cast<T>(grad_output) : any_nan;
  const auto grad = [one](std::int64_t) {
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

template <int power, class T>
void prepare_q(void* out, const void* log_var_q, std::int64_t numel, Bounds bounds) {
  const math::Clamp<T> clamp = to_clamp<T>(bounds);
  KL_EXT_LOOP
  for (std::int64_t i = 0; i < numel; ++i) {
    const T clamped = math::clamp(static_cast<const T*>(log_var_q)[i], clamp.low, clamp.high);
    static_cast<T*>(out)[i] = math::inverse_variance<power>(clamped);
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
#define KL_EXT_PREPARE_Q(power)                                  \
  {{},                                                           \
   KL_EXT_ARITHMETICS(prepare_q, math::PairGivenQ<true>::power), \
   KL_EXT_ARITHMETICS(prepare_q, math::PairGivenQ<false>::power)}
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
    KL_EXT_BY_LOSS(sum_row_chunks, KL_EXT_STORAGES),
    KL_EXT_GIVEN_Q(forward),
    KL_EXT_GIVEN_Q(backward),
    KL_EXT_GIVEN_Q(backward_to_lanes),
    KL_EXT_GIVEN_Q(accumulate),
    KL_EXT_GIVEN_Q(sum_chunks),
    KL_EXT_GIVEN_Q(sum_row_chunks),
    KL_EXT_PREPARE_Q(kForwardPower),
    KL_EXT_PREPARE_Q(kBackwardPower),
    KL_EXT_BY_STORAGE(load),
    KL_EXT_BY_STORAGE(store),
    {add_to_lanes<float>, add_to_lanes<double>},
    {fold_lanes<float>, fold_lanes<double>},
    {sum_rows<float>, sum_rows<double>},
    {divide<float>, divide<double>},
};

} // namespace kl_ext::cpu::KL_EXT_CPU_CAPABILITY
