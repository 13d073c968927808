#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "../ops.h"
#include "../reduction.h"
#include "formulas.h"
#include "loss.h"

namespace kl_ext::autograd {
namespace {

constexpr std::array<const char*, 4> kNames = {"mu_p", "log_var_p", "mu_q", "log_var_q"};

// With q (Formula has four inputs) or against the standard normal.
template <class Formula>
struct GaussianKlDiv : Formula {
  static constexpr size_t N = Formula::kInputs;
  static constexpr const char* kForwardName = "gaussian_kl_div";
  static constexpr const char* kBackwardName = "gaussian_kl_div_backward";
  static constexpr const char* kNodeName = N == 4 ? "GaussianKlDivBackward" : "StandardGaussianKlDivBackward";
  static constexpr std::array<const char*, N> kArguments = [] {
    std::array<const char*, N> names{};
    std::copy_n(kNames.begin(), N, names.begin());
    return names;
  }();

  std::string reduction;
  std::optional<std::vector<int64_t>> dim;
  bool keepdim = false;

  at::OptionalIntArrayRef dims() const { return dim ? at::OptionalIntArrayRef(*dim) : std::nullopt; }

  Reduction parsed(int64_t rank) const { return parse_reduction(kForwardName, reduction, dims(), rank); }

  static std::optional<at::Tensor> q(const Tensors<N>& x, size_t i) {
    if constexpr (N == 4) {
      return optional(x[i]);
    }
    return std::nullopt;
  }

  at::Tensor forward(const Tensors<N>& x, std::optional<at::ScalarType> dtype) const {
    return ops::gaussian_kl_div(x[0], x[1], q(x, 2), q(x, 3), this->clamp_min, this->clamp_max, reduction, dims(), keepdim,
                                dtype);
  }

  Tensors<N> backward(const at::Tensor& grad_output, const Tensors<N>& x, std::array<bool, N> mask, std::string_view how,
                      at::OptionalIntArrayRef over, bool keeps) const {
    std::array<bool, 4> output_mask{};
    std::copy(mask.begin(), mask.end(), output_mask.begin());
    auto all = ops::gaussian_kl_div_backward(grad_output, x[0], x[1], q(x, 2), q(x, 3), this->clamp_min, this->clamp_max, how,
                                             over, output_mask, keeps);
    if constexpr (N == 4) {
      return {std::get<0>(all), std::get<1>(all), std::get<2>(all), std::get<3>(all)};
    } else {
      return {std::get<0>(all), std::get<1>(all)};
    }
  }

  Tensors<N> backward(const at::Tensor& grad_output, const Tensors<N>& x, std::array<bool, N> mask) const {
    return backward(grad_output, x, mask, reduction, dims(), keepdim);
  }

  void backward_out(const at::Tensor& grad_output, const Tensors<N>& x, const Tensors<N>& gradients) const {
    ops::gaussian_kl_div_backward_out(grad_output, x[0], x[1], q(x, 2), q(x, 3), this->clamp_min, this->clamp_max, reduction,
                                      dims(), keepdim, optional(gradients[0]), optional(gradients[1]), q(gradients, 2),
                                      q(gradients, 3));
  }

  Tensors<N> terms_backward(const at::Tensor& grad_terms, const Tensors<N>& x, std::array<bool, N> mask) const {
    return backward(grad_terms, x, mask, "none", std::nullopt, /*keeps=*/false);
  }

  static bool needs_shapes() { return true; }

  at::Tensor reduce(const at::Tensor& terms) const {
    const Reduction how = parsed(terms.dim());
    if (how.is_none) {
      return terms;
    }
    at::DimVector reduced;
    for (int64_t i = 0; i < terms.dim(); ++i) {
      if (how.reduced[i]) {
        reduced.push_back(i);
      }
    }
    const at::Tensor sum = terms.dim() == 0 ? terms : at::sum(terms, reduced, keepdim);
    return how.divides ? quotient(sum, how.divisor(terms.sym_sizes())) : sum;
  }

  at::Tensor unreduce(const at::Tensor& grad_output, c10::SymIntArrayRef shape) const {
    const Reduction how = parsed(static_cast<int64_t>(shape.size()));
    const at::Tensor divided = how.divides ? quotient(grad_output, how.divisor(shape)) : grad_output;
    return keepdim ? divided : how.unsqueeze(divided);
  }

  void collect(CompiledNodeArgs& args) const {
    args.collect(this->clamp_min);
    args.collect(this->clamp_max);
    args.collect(reduction);
    args.collect(dim);
    args.collect(keepdim);
  }
};

using Standard = GaussianKlDiv<SingleFormula>;
using Pair = GaussianKlDiv<PairFormula<1>>;

template <class Op>
Op with(double clamp_min, double clamp_max, std::string_view reduction, at::OptionalIntArrayRef dim, bool keepdim) {
  Op op;
  op.clamp_min = clamp_min;
  op.clamp_max = clamp_max;
  op.reduction = reduction;
  if (dim) {
    op.dim = dim->vec();
  }
  op.keepdim = keepdim;
  return op;
}

at::Tensor gaussian_kl_div(const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
                           const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max,
                           std::string_view reduction, at::OptionalIntArrayRef dim, bool keepdim,
                           std::optional<at::ScalarType> dtype) {
  check_together("gaussian_kl_div", mu_q, log_var_q);
  return mu_q ? forward(with<Pair>(clamp_min, clamp_max, reduction, dim, keepdim), {mu_p, log_var_p, *mu_q, *log_var_q}, dtype)
              : forward(with<Standard>(clamp_min, clamp_max, reduction, dim, keepdim), {mu_p, log_var_p}, dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_kl_div_backward(
    const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p, const std::optional<at::Tensor>& mu_q,
    const std::optional<at::Tensor>& log_var_q, double clamp_min, double clamp_max, std::string_view reduction,
    at::OptionalIntArrayRef dim, std::array<bool, 4> output_mask, bool keepdim) {
  check_together("gaussian_kl_div_backward", mu_q, log_var_q);
  if (mu_q) {
    return std::tuple_cat(backward(with<Pair>(clamp_min, clamp_max, reduction, dim, keepdim), grad_output,
                                   {mu_p, log_var_p, *mu_q, *log_var_q}, output_mask));
  }
  const auto [mu, log_var] = backward(with<Standard>(clamp_min, clamp_max, reduction, dim, keepdim), grad_output,
                                      {mu_p, log_var_p}, {output_mask[0], output_mask[1]});
  return {mu, log_var, at::Tensor(), at::Tensor()};
}

void gaussian_kl_div_backward_out(const at::Tensor& grad_output, const at::Tensor& mu_p, const at::Tensor& log_var_p,
                                  const std::optional<at::Tensor>& mu_q, const std::optional<at::Tensor>& log_var_q,
                                  double clamp_min, double clamp_max, std::string_view reduction, at::OptionalIntArrayRef dim,
                                  bool keepdim, const std::optional<at::Tensor>& grad_mu_p,
                                  const std::optional<at::Tensor>& grad_log_var_p, const std::optional<at::Tensor>& grad_mu_q,
                                  const std::optional<at::Tensor>& grad_log_var_q) {
  check_together("gaussian_kl_div_backward", mu_q, log_var_q);
  const at::Tensor of_mu_p = grad_mu_p.value_or(at::Tensor());
  const at::Tensor of_log_var_p = grad_log_var_p.value_or(at::Tensor());
  if (mu_q) {
    backward_out(with<Pair>(clamp_min, clamp_max, reduction, dim, keepdim), grad_output, {mu_p, log_var_p, *mu_q, *log_var_q},
                 {of_mu_p, of_log_var_p, grad_mu_q.value_or(at::Tensor()), grad_log_var_q.value_or(at::Tensor())});
  } else {
    backward_out(with<Standard>(clamp_min, clamp_max, reduction, dim, keepdim), grad_output, {mu_p, log_var_p},
                 {of_mu_p, of_log_var_p});
  }
}

TORCH_LIBRARY_IMPL(kl_ext, Autograd, m) {
  m.impl("gaussian_kl_div", gaussian_kl_div);
  m.impl("gaussian_kl_div_backward", gaussian_kl_div_backward);
  m.impl("gaussian_kl_div_backward.out", gaussian_kl_div_backward_out);
}

} // namespace
} // namespace kl_ext::autograd
