// Calls every function of kl_ext/ops.h, with its defaults and with every option, and prints each result beside the same call in
// Python. test_cpp.py computes what it should be.
#include <ATen/autocast_mode.h>
#include <ATen/ops/linspace.h>
#include <kl_ext/ops.h>

#include <cstdio>

namespace {

// `call|dtype|shape|numbers`
void print(const char* call, const at::Tensor& result) {
  std::printf("%s|%s|", call, c10::toString(result.scalar_type()));
  for (const int64_t size : result.sizes()) {
    std::printf("%lld ", static_cast<long long>(size));
  }
  std::printf("|");
  const at::Tensor numbers = result.to(at::kDouble).contiguous();
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    std::printf("%.17g ", numbers.const_data_ptr<double>()[i]);
  }
  std::printf("\n");
}

at::Tensor numbers(double first, double last) { return at::linspace(first, last, 6, at::kDouble).view({2, 3}); }

} // namespace

int main() {
  const at::Tensor mu = numbers(-2, 3), log_var = numbers(-40, 30), scale = numbers(0.5, 2); // beyond the default clamp
  const at::Tensor mu_q = numbers(1, -1)[0], log_var_q = numbers(-1, 1)[1], scale_q = numbers(3, 1)[0];
  const at::Tensor mask = mu > -1;

  using namespace kl_ext;
  print("kl_div_single_loss(mu, log_var)", kl_div_single_loss(mu, log_var));
  print("kl_div_single_loss(mu, log_var, clamp_min=-1, clamp_max=2)", kl_div_single_loss(mu, log_var, -1, 2));
  print("kl_div_single_loss(mu, log_var, clamp_min=None, clamp_max=None)",
        kl_div_single_loss(mu, log_var, std::nullopt, std::nullopt));
  print("kl_div_pair_loss(mu, log_var, mu_q, log_var_q)", kl_div_pair_loss(mu, log_var, mu_q, log_var_q));
  print("kl_div_pair_loss(mu, log_var, mu_q, log_var_q, clamp_min=-1, clamp_max=2)",
        kl_div_pair_loss(mu, log_var, mu_q, log_var_q, -1, 2));

  print("gaussian_kl_div(mu, log_var)", gaussian_kl_div(mu, log_var));
  print("gaussian_kl_div(mu, log_var, reduction='batchmean')", gaussian_kl_div(mu, log_var, {.reduction = "batchmean"}));
  print("gaussian_kl_div(mu, log_var, mu_q, log_var_q)", gaussian_kl_div(mu, log_var, mu_q, log_var_q));
  print("gaussian_kl_div(mu, log_var, clamp_min=None, clamp_max=None, reduction='mean', dim=(0, -1))",
        gaussian_kl_div(mu, log_var,
                        {.clamp_min = std::nullopt, .clamp_max = std::nullopt, .reduction = "mean", .dim = {0, -1}}));
  print(
      "gaussian_kl_div(mu, log_var, mu_q, log_var_q, weight=mask, clamp_min=-1, clamp_max=2, reduction='sum', dim=(1,),"
      " keepdim=True, dtype=torch.float32)",
      gaussian_kl_div(mu, log_var, mu_q, log_var_q,
                      {.weight = mask,
                       .clamp_min = -1,
                       .clamp_max = 2,
                       .reduction = "sum",
                       .dim = {1},
                       .keepdim = true,
                       .dtype = at::kFloat}));

  print("normal_kl_div(mu, scale)", normal_kl_div(mu, scale));
  print("normal_kl_div(mu, scale, reduction='mean')", normal_kl_div(mu, scale, {.reduction = "mean"}));
  print("normal_kl_div(mu, scale, mu_q, scale_q)", normal_kl_div(mu, scale, mu_q, scale_q));
  print("normal_kl_div(mu, scale, mu_q, scale_q, weight=mask, reduction='sum', dim=(1,), keepdim=True, dtype=torch.float32)",
        normal_kl_div(mu, scale, mu_q, scale_q,
                      {.weight = mask, .reduction = "sum", .dim = {1}, .keepdim = true, .dtype = at::kFloat}));

  const at::Tensor leaf = mu.clone().requires_grad_();
  gaussian_kl_div(leaf, log_var, mu_q, log_var_q, {.reduction = "batchmean"}).backward();
  print("gradient(gaussian_kl_div, mu, log_var, mu_q, log_var_q, reduction='batchmean')", leaf.grad());

  at::autocast::set_autocast_enabled(at::kCPU, true);
  print("normal_kl_div(mu.bfloat16().float(), scale.bfloat16().float())",
        normal_kl_div(mu.to(at::kBFloat16), scale.to(at::kBFloat16)));
}
