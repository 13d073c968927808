// Fuzz targets for the headers without torch: each turns bytes into an input, runs the real code, and compares it with a slow
// twin that is easy to believe. headers.py compiles and runs them; --target=NAME chooses one.
#define KL_EXT_CPU_CAPABILITY DEFAULT

#include <functional>
#include <random>
#include <string>
#include <string_view>

#include "arithmetic.h"
#include "layouts.h"

namespace {

struct Target {
  std::string_view name;
  void (*run)(Bytes&);
};

constexpr Target kTargets[] = {{"dividers", dividers},       {"chunks", chunks}, {"pieces", pieces},
                               {"sum_layouts", sum_layouts}, {"sums", sums},     {"halves", halves}};
const Target* target = nullptr;

} // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  for (int i = 1; i < *argc; ++i) {
    for (const Target& one : kTargets) {
      target = (*argv)[i] == "--target=" + std::string(one.name) ? &one : target;
    }
  }
  CHECK(target != nullptr);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  target->run(bytes);
  return 0;
}

#if defined(KL_EXT_WITHOUT_LIBFUZZER)
// Random bytes, without guidance: for compilers that have no libFuzzer. Takes --target, -runs and -seed.
int main(int argc, char** argv) {
  LLVMFuzzerInitialize(&argc, &argv);
  long runs = 0;
  unsigned seed = 0;
  for (int i = 1; i < argc; ++i) {
    std::sscanf(argv[i], "-runs=%ld", &runs);
    std::sscanf(argv[i], "-seed=%u", &seed);
  }
  std::mt19937_64 random(seed);
  for (long run = 0; run < runs; ++run) {
    std::vector<std::uint8_t> input(random() % 256);
    std::generate(input.begin(), input.end(), std::ref(random));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::fprintf(stderr, "Done %ld runs\n", runs);
}
#endif
