// Runs the CPU kernels of one instruction set on fixed inputs, without torch, and prints a hash of the results of each: what
// another processor has to print too.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace {

using namespace kl_ext;
using namespace kl_ext::cpu;

constexpr std::int64_t kTerms = 10007; // not a multiple of a vector, of 64 lanes, or of a chunk
constexpr std::int64_t kBytes = kTerms * sizeof(double);
constexpr const char* kStorageNames[] = {"float16", "bfloat16", "float32", "float64"};
const Kernels& kernels = KL_EXT_CPU_CAPABILITY::kernels;

using Buffer = std::vector<char>;

// In (-1, 1); the same numbers everywhere.
double next_random() {
  static std::uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<std::int64_t>(state) >> 11) * 0x1p-52;
}

std::int64_t size_of(Storage storage) { return storage == kFloat64 ? 8 : storage == kFloat32 ? 4 : 2; }

Buffer stored(const std::vector<double>& numbers, Storage storage) {
  Buffer out(kBytes);
  kernels.store[storage][kDouble](out.data(), numbers.data(), Tile{kTerms, 1, size_of(storage), 0});
  return out;
}

// Means and log-variances at all distances from N(0, 1), or positive deviations.
template <class F>
Buffer input(int i, Storage storage) {
  std::vector<double> numbers(kTerms);
  for (std::int64_t n = 0; n < kTerms; ++n) {
    const int exponent = static_cast<int>(n % 16);
    numbers[n] = F::kRanges || i % 2 == 0 ? std::ldexp(next_random(), 5 - exponent)
                                          : std::ldexp(1.5 + 0.49 * next_random(), 4 - exponent / 2);
  }
  return stored(numbers, storage);
}

Buffer weights(Storage storage) {
  std::vector<double> numbers(kTerms);
  for (auto& number : numbers) {
    number = next_random() < 0 ? 0.0 : next_random();
  }
  return stored(numbers, storage);
}

// FNV-1a of the numbers, where every NaN is one: processors differ in the bits of theirs.
void print_hash(const char* formula, const char* kernel, bool wide, Storage read, const Buffer& out, Storage storage,
                std::int64_t numel) {
  std::vector<double> numbers(kTerms);
  kernels.load[storage][kDouble](numbers.data(), out.data(), Tile{numel, 1, size_of(storage), 0});
  std::uint64_t hash = 14695981039346656037u;
  for (std::int64_t n = 0; n < numel; ++n) {
    std::uint64_t bits = 0;
    const double number = std::isnan(numbers[n]) ? 0.0 : numbers[n];
    std::memcpy(&bits, &number, sizeof bits);
    hash = (hash ^ bits ^ (std::isnan(numbers[n]) ? 1u : 0u)) * 1099511628211u;
    hash ^= hash >> 32;
  }
  std::printf("%s %s %s %s %016llx\n", formula, kernel, wide ? "wide" : "narrow", kStorageNames[read],
              static_cast<unsigned long long>(hash));
}

template <class F>
void run(const char* name, const FormulaKernels& of, bool wide, Storage storage) {
  const Settings settings = wide ? Settings{-HUGE_VAL, HUGE_VAL} : Settings{-30.0, 20.0};
  const Storage arithmetic = storage == kFloat64 ? kFloat64 : kFloat32;
  std::vector<Buffer> inputs;
  for (int i = 0; i < F::kInputs; ++i) {
    inputs.push_back(F::kIsWeighted && i == F::kInputs - 1 ? weights(storage) : input<F>(i, storage));
  }
  const Buffer grad = stored(std::vector<double>(kTerms, 0.75), storage);
  std::vector<Buffer> results(1 + F::kGradients, Buffer(kBytes));
  std::vector<void*> pointers;
  const std::vector<std::int64_t> strides(2 * F::kInputs + 3, 0);
  const auto block = [&] { return Block{pointers.data(), strides.data(), kTerms, 1}; };
  const auto add_inputs = [&] {
    for (auto& buffer : inputs) {
      pointers.push_back(buffer.data());
    }
  };
  if (of.forward[wide][storage] != nullptr) {
    pointers = {results[0].data()};
    add_inputs();
    of.forward[wide][storage](block(), settings);
    print_hash(name, "forward", wide, storage, results[0], storage, kTerms);
  }
  if (of.sum_chunks[wide][storage] != nullptr) {
    pointers.clear();
    add_inputs();
    of.sum_chunks[wide][storage](results[0].data(), block(), 0, kTerms, settings);
    print_hash(name, "sum_chunks", wide, storage, results[0], arithmetic, (kTerms + 1023) / 1024);
  }
  if (of.backward[wide][storage] != nullptr) {
    pointers.clear();
    for (int i = 0; i < F::kGradients; ++i) {
      pointers.push_back(results[i].data());
    }
    pointers.push_back(const_cast<char*>(grad.data()));
    add_inputs();
    of.backward[wide][storage](block(), settings);
    for (int i = 0; i < F::kGradients; ++i) {
      print_hash(name, "backward", wide, storage, results[i], storage, kTerms);
    }
  }
}

template <class... F>
void run_all(math::FormulaList<F...>) {
  for (const bool wide : {false, true}) {
    for (const Storage storage : {kFloat16, kBFloat16, kFloat32, kFloat64}) {
      int i = 0;
      ((run<F>("formula", kernels.formulas[i], wide, storage),
        run<math::Weighted<F>>("weighted", kernels.weighted[i], wide, storage), ++i),
       ...);
    }
  }
}

} // namespace

int main() { run_all(math::Formulas()); }
