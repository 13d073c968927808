// Trains a small variational autoencoder with libtorch and kl_ext, without Python, and prints its loss.
//
// The data are 16 numbers each, made of 2 hidden factors and noise; encoder and decoder are linear. The loss is the negative
// ELBO in nats per example, up to a constant: the reconstruction error under a Gaussian of variance 1, and the divergence of
// the latents from N(0, 1).
//
// These headers compile faster than <torch/torch.h>, which has torch::nn and torch::optim.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/zeros.h>
#include <kl_ext/ops.h>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kExamples = 256;
constexpr int64_t kSize = 16;
constexpr int64_t kLatents = 4;
constexpr double kLearningRate = 0.01;

struct Autoencoder {
  Tensor encoder = (0.1 * at::randn({kSize, 2 * kLatents})).requires_grad_(); // to means and log-variances
  Tensor bias = at::zeros({2 * kLatents}).requires_grad_();
  Tensor decoder = (0.1 * at::randn({kLatents, kSize})).requires_grad_();

  Tensor loss(const Tensor& x) const { // [B, kSize]
    const std::vector<Tensor> halves = (x.matmul(encoder) + bias).chunk(2, 1);
    const Tensor &mu = halves[0], &log_var = halves[1];                    // [B, kLatents]
    const Tensor z = mu + (0.5 * log_var).exp() * at::randn_like(log_var); // the reparametrisation trick
    const Tensor reconstruction = 0.5 * (z.matmul(decoder) - x).square().sum(1).mean();
    return reconstruction + kl_ext::gaussian_kl_div(mu, log_var, {.reduction = "batchmean"});
  }

  void descend() {
    const at::NoGradGuard guard;
    for (Tensor* weight : {&encoder, &bias, &decoder}) {
      weight->sub_(kLearningRate * weight->grad());
      weight->mutable_grad().reset();
    }
  }
};

} // namespace

int main() {
  at::manual_seed(0);
  const Tensor x = at::randn({kExamples, 2}).matmul(at::randn({2, kSize})) + 0.1 * at::randn({kExamples, kSize});
  Autoencoder model;
  double first = 0, last = 0;
  for (int step = 0; step <= 500; ++step) {
    const Tensor loss = model.loss(x);
    loss.backward();
    model.descend();
    last = loss.item<double>();
    first = step == 0 ? last : first;
    if (step % 100 == 0) {
      std::printf("step %3d: %.2f nats per example\n", step, last);
    }
  }
  return last < 0.5 * first ? 0 : 1;
}
