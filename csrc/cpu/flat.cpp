#include "flat.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <memory>

#include "../math/summation.h"
#include "block.h"

namespace kl_ext::cpu {
namespace {

using math::kChunk;

bool are_flat(Arguments arguments) {
  const at::Tensor& first = arguments[0].tensor;
  return std::all_of(arguments.begin(), arguments.end(), [&](const Argument& argument) {
    const at::Tensor& tensor = argument.tensor;
    return tensor.scalar_type() == first.scalar_type() && tensor.is_contiguous() && tensor.sizes() == first.sizes();
  });
}

// The numbers of flat tensors, from the given one on.
template <class Pointer>
struct Flat {
  std::array<Pointer, kMaxInputs> from(int64_t first) const {
    auto pointers = data;
    for (auto& pointer : pointers) {
      pointer = pointer + first * element_size;
    }
    return pointers;
  }

  int64_t element_size;
  std::array<Pointer, kMaxInputs> data{};
};

Flat<const char*> numbers_of(Arguments arguments) {
  Flat<const char*> flat{static_cast<int64_t>(arguments[0].tensor.element_size())};
  for (size_t i = 0; i < arguments.size(); ++i) {
    flat.data[i] = static_cast<const char*>(arguments[i].tensor.const_data_ptr());
  }
  return flat;
}

// The kernels take pointers to numbers of any type.
template <class To, class From>
std::array<To, kMaxInputs> untyped(const std::array<From, kMaxInputs>& pointers) {
  return {pointers[0], pointers[1], pointers[2], pointers[3]};
}

} // namespace

std::optional<at::Tensor> forward_flat(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result) {
  const at::Tensor& first = inputs[0].tensor;
  if (result != first.scalar_type() || !are_flat(inputs)) {
    return std::nullopt;
  }
  const Forward kernel = kernels().forward[loss][is_wide(bounds, arithmetic_of(inputs))][storage_of(result)];
  const at::Tensor out(at::detail::empty_cpu(first.sizes(), result));
  prefer_huge_pages(out);
  const auto numbers = numbers_of(inputs);
  char* const data = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, out.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    const auto pointers = untyped<const void*>(numbers.from(begin));
    kernel(data + begin * numbers.element_size, pointers.data(), end - begin, bounds);
  });
  return out;
}

std::optional<at::Tensor> sum_flat(Loss loss, Arguments inputs, Bounds bounds, at::ScalarType result,
                                   std::optional<int64_t> divisor) {
  const Arithmetic arithmetic = arithmetic_of(inputs, result);
  if (!are_flat(inputs) || arithmetic != arithmetic_of(inputs)) {
    return std::nullopt;
  }
  const at::Tensor& first = inputs[0].tensor;
  const SumChunks kernel = kernels().sum_chunks[loss][is_wide(bounds, arithmetic)][storage_of(first.scalar_type())];
  const auto numbers = numbers_of(inputs);
  const int64_t numel = first.numel();
  const int64_t size = size_of(arithmetic);
  const int64_t chunks = (numel + kChunk - 1) / kChunk;

  constexpr int64_t kFew = 16;
  alignas(64) char few[kFew * sizeof(double)] = {};
  const auto many = chunks > kFew ? std::make_unique_for_overwrite<char[]>(chunks * size) : nullptr;
  char* const partials = many ? many.get() : few;
  at::parallel_for(0, chunks, at::internal::GRAIN_SIZE / kChunk, [&](int64_t begin, int64_t end) {
    const auto pointers = untyped<const void*>(numbers.from(begin * kChunk));
    kernel(partials + begin * size, pointers.data(), std::min(end * kChunk, numel) - begin * kChunk, bounds);
  });
  for (int64_t left = chunks; left > 1; left = (left + kChunk - 1) / kChunk) {
    for (int64_t start = 0; start < left; start += kChunk) {
      const int64_t count = std::min<int64_t>(kChunk, left - start);
      kernels().sum_rows[arithmetic](partials + start / kChunk * size, partials + start * size, 1, count);
    }
  }
  if (divisor) {
    kernels().divide[arithmetic](partials, 1, *divisor);
  }
  at::Tensor sum(at::detail::empty_cpu({}, result));
  kernels().store[storage_of(result)][arithmetic](sum.mutable_data_ptr(), partials, Tile{1, 1, 0, 0});
  return sum;
}

std::optional<Gradients> backward_flat(Loss loss, Arguments arguments, Bounds bounds) {
  const at::Tensor& grad_output = arguments[0].tensor;
  const Arguments inputs = arguments.slice(1);
  const auto strides = grad_output.strides();
  const bool is_one = std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride == 0; });
  const Arithmetic arithmetic = arithmetic_of(inputs);
  if (!are_flat(is_one ? inputs : arguments) || grad_output.sizes() != inputs[0].tensor.sizes() || grad_output.numel() == 0 ||
      arithmetic != arithmetic_of(arguments)) {
    return std::nullopt;
  }
  const bool wide = is_wide(bounds, arithmetic);
  const Storage storage = storage_of(inputs[0].tensor.scalar_type());
  Gradients gradients;
  const auto numbers = numbers_of(inputs);
  Flat<char*> results{numbers.element_size};
  for (size_t i = 0; i < inputs.size(); ++i) {
    gradients[i] = at::empty_like(inputs[i].tensor); // strides of dimensions of size 1 and all
    prefer_huge_pages(gradients[i]);
    results.data[i] = static_cast<char*>(gradients[i].mutable_data_ptr());
  }
  const char* const grad = static_cast<const char*>(grad_output.const_data_ptr());
  double one = 0; // the only number of grad_output
  if (is_one) {
    kernels().load[storage_of(grad_output.scalar_type())][kDouble](&one, grad, Tile{1, 1, 0, 0});
  }
  const Backward of_each = kernels().backward[loss][wide][storage];
  const BackwardOfOne of_one = kernels().backward_of_one[loss][wide][storage];
  at::parallel_for(0, grad_output.numel(), at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    const auto pointers = untyped<const void*>(numbers.from(begin));
    const auto into = untyped<void*>(results.from(begin));
    if (is_one) {
      of_one(into.data(), one, pointers.data(), end - begin, bounds);
    } else {
      of_each(into.data(), grad + begin * numbers.element_size, pointers.data(), end - begin, bounds);
    }
  });
  return gradients;
}

} // namespace kl_ext::cpu
