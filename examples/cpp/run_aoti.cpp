// Runs a model that export.py has compiled with AOTInductor, without Python:
//
//   build/cpp/run_aoti model.pt2 $(python examples/cpp/export.py model.pt2)
//
// The model calls an operator of kl_ext. Linking kl_ext::kl_ext is all that it needs for that: libkl_ext.so is loaded with the
// program and registers its operators, before main loads the model.
#include <ATen/ops/linspace.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cmath>
#include <iostream>
#include <string>

int main(int count, char** arguments) {
  if (count != 3) {
    std::cerr << "usage: run_aoti MODEL EXPECTED\n";
    return 2;
  }
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const at::Tensor x = at::linspace(-1, 1, 24).view({4, 6}); // the input of export.py

  const float expected = std::stof(arguments[2]);
  const float result = model.run({x}).at(0).item<float>();
  std::cout << "result " << result << ", expected " << expected << '\n';
  return std::abs(result - expected) <= 1e-5f * std::abs(expected) ? 0 : 1;
}
