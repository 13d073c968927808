// Runs each operator under callgrind, one dump for each case: count.py builds it and reads the dumps.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <valgrind/callgrind.h>

#include <array>
#include <cstdio>
#include <functional>
#include <optional>
#include <string>

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

template <class Function>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// The instructions of `calls` calls, after one that sets things up.
void measure(const std::string& name, int calls, const std::function<void()>& call) {
  call();
  CALLGRIND_ZERO_STATS;
  for (int i = 0; i < calls; ++i) {
    call();
  }
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

} // namespace

int main(int, char** arguments) {
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const auto single =
      find<Tensor(const Tensor&, const Tensor&, double, double, std::optional<at::ScalarType>)>("kl_ext::kl_div_single_loss");
  const auto pair =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, std::optional<at::ScalarType>)>(
          "kl_ext::kl_div_pair_loss");
  const auto single_backward =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, double, std::array<bool, 2>)>(
          "kl_ext::kl_div_single_loss_backward");
  const auto pair_backward = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, std::array<bool, 4>)>(
      "kl_ext::kl_div_pair_loss_backward");
  const auto divergence =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, double,
                  double, std::string_view, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>)>(
          "kl_ext::gaussian_kl_div");
  const auto divergence_backward = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double, double,
      std::string_view, at::OptionalIntArrayRef, std::array<bool, 4>, bool, const OptionalTensor&)>(
      "kl_ext::gaussian_kl_div_backward");
  const auto normal =
      find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                  std::string_view, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>)>("kl_ext::normal_kl_div");
  const auto normal_backward = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, std::string_view,
      at::OptionalIntArrayRef, std::array<bool, 4>, bool, const OptionalTensor&)>("kl_ext::normal_kl_div_backward");
  constexpr double kLow = -30, kHigh = 20;
  constexpr std::array<bool, 2> kBoth{true, true};
  constexpr std::array<bool, 4> kAll{true, true, true, true}, kOfP{true, true, false, false};

  { // whole calls, of which the elements are hardly a part
    const Tensor x = at::rand({4}), y = at::rand({4});
    const Tensor leaf_x = at::rand({4}).requires_grad_(), leaf_y = at::rand({4}).requires_grad_();
    constexpr int kCalls = 200;
    measure("call add", kCalls, [&] { at::add(x, y); });
    measure("call add grad", kCalls, [&] { at::add(leaf_x, leaf_y); });
    measure("call single", kCalls, [&] { single.call(x, y, kLow, kHigh, {}); });
    measure("call single grad", kCalls, [&] { single.call(leaf_x, leaf_y, kLow, kHigh, {}); });
    measure("call pair", kCalls, [&] { pair.call(x, y, y, x, kLow, kHigh, {}); });
    measure("call batchmean", kCalls, [&] { divergence.call(x, y, {}, {}, {}, kLow, kHigh, "batchmean", {}, false, {}); });
    measure("call batchmean grad", kCalls,
            [&] { divergence.call(leaf_x, leaf_y, {}, {}, {}, kLow, kHigh, "batchmean", {}, false, {}); });
  }

  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const std::string suffix = std::string(" ") + c10::toString(dtype);
    const int64_t rows = 64, columns = 64;
    const auto numbers = [&](at::IntArrayRef shape) { return (at::rand(shape) - 0.5).to(dtype); };
    const Tensor x = numbers({rows, columns}), y = numbers({rows, columns}), grad = numbers({rows, columns});
    const auto halves = numbers({rows, 2 * columns}).chunk(2, 1);
    const Tensor prior_mu = numbers({columns}), prior_log_var = numbers({columns});
    const Tensor one = at::ones({}, dtype), rows_grad = numbers({rows});
    measure("single" + suffix, 1, [&] { single.call(x, y, kLow, kHigh, {}); });
    measure("single, wide clamp" + suffix, 1, [&] { single.call(x, y, -1e3, 1e3, {}); });
    measure("single of halves" + suffix, 1, [&] { single.call(halves[0], halves[1], kLow, kHigh, {}); });
    measure("single, transposed" + suffix, 1, [&] { single.call(x.t(), y, kLow, kHigh, {}); });
    measure("pair" + suffix, 1, [&] { pair.call(x, y, y, x, kLow, kHigh, {}); });
    measure("pair with a prior" + suffix, 1, [&] { pair.call(x, y, prior_mu, prior_log_var, kLow, kHigh, {}); });
    measure("single backward" + suffix, 1, [&] { single_backward.call(grad, x, y, kLow, kHigh, kBoth); });
    measure("single backward of a sum" + suffix, 1,
            [&] { single_backward.call(one.expand({rows, columns}), x, y, kLow, kHigh, kBoth); });
    measure("pair backward" + suffix, 1, [&] { pair_backward.call(grad, x, y, y, x, kLow, kHigh, kAll); });
    measure("pair backward with a prior" + suffix, 1,
            [&] { pair_backward.call(grad, x, y, prior_mu, prior_log_var, kLow, kHigh, kAll); });
    measure("batchmean" + suffix, 1, [&] { divergence.call(x, y, {}, {}, {}, kLow, kHigh, "batchmean", {}, false, {}); });
    measure("batchmean of halves" + suffix, 1,
            [&] { divergence.call(halves[0], halves[1], {}, {}, {}, kLow, kHigh, "batchmean", {}, false, {}); });
    measure("sum of rows" + suffix, 1,
            [&] { divergence.call(x, y, {}, {}, {}, kLow, kHigh, "sum", at::IntArrayRef({1}), false, {}); });
    measure("sum of columns" + suffix, 1,
            [&] { divergence.call(x, y, {}, {}, {}, kLow, kHigh, "sum", at::IntArrayRef({0}), false, {}); });
    measure("divergence, batchmean" + suffix, 1,
            [&] { divergence.call(x, y, y, x, {}, kLow, kHigh, "batchmean", {}, false, {}); });
    const Tensor mask = at::rand({rows, 1}) < 0.7;
    measure("masked batchmean" + suffix, 1,
            [&] { divergence.call(x, y, {}, {}, mask, kLow, kHigh, "batchmean", {}, false, {}); });
    measure("masked batchmean backward" + suffix, 1,
            [&] { divergence_backward.call(one, x, y, {}, {}, kLow, kHigh, "batchmean", {}, kOfP, false, mask); });
    const Tensor p = at::rand({rows, columns}).to(dtype) + 0.5, q = at::rand({rows, columns}).to(dtype) + 0.5;
    measure("normal" + suffix, 1, [&] { normal.call(x, p, y, q, {}, "none", {}, false, {}); });
    measure("normal, batchmean" + suffix, 1, [&] { normal.call(x, p, y, q, {}, "batchmean", {}, false, {}); });
    measure("normal backward" + suffix, 1, [&] { normal_backward.call(grad, x, p, y, q, "none", {}, kAll, false, {}); });
    measure("batchmean backward" + suffix, 1,
            [&] { divergence_backward.call(one, x, y, {}, {}, kLow, kHigh, "batchmean", {}, kOfP, false, {}); });
    measure("batchmean backward of halves" + suffix, 1, [&] {
      divergence_backward.call(one, halves[0], halves[1], {}, {}, kLow, kHigh, "batchmean", {}, kOfP, false, {});
    });
    measure("backward of the sums of rows" + suffix, 1, [&] {
      divergence_backward.call(rows_grad, halves[0], halves[1], {}, {}, kLow, kHigh, "sum", at::IntArrayRef({1}), kOfP, false,
                               {});
    });
    measure("batchmean backward with a prior" + suffix, 1, [&] {
      divergence_backward.call(one, x, y, prior_mu, prior_log_var, kLow, kHigh, "batchmean", {}, kAll, false, {});
    });
  }
  return 0;
}
