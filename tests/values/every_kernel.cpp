// Runs the CPU kernels of one instruction set on the set of tests/support/hashed.py, without torch, and prints a checksum of
// each result. Where several kernels compute a result, all of them are run and have to agree; one that was not run is an error.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "math/summation.h"

namespace {

using namespace kl_ext;
using namespace kl_ext::cpu;

const Kernels& kernels = KL_EXT_CPU_CAPABILITY::kernels;
constexpr const char* kStorageNames[] = {"float16", "bfloat16", "float32", "float64", "bool"};

// As in hashed.py.

constexpr std::int64_t kTerms = 5175;

struct Shape {
  std::int64_t rows;
  std::int64_t columns;
};

constexpr Shape kFlat{1, kTerms};
constexpr Shape kLongRows{5, 1035};
constexpr Shape kLongColumns{1035, 5};
constexpr Shape kPrior{45, 115}; // shared by the rows

struct Operator {
  const char* name;
  int formula;
  int inputs;
  bool clamps;
  bool reduces;
  bool has_deviations;
  double scale;
  double offset;
};

constexpr Operator kOperators[] = {
    {"kl_div_single_loss", math::kFormula<math::StandardDivergence>, 2, true, false, false, 1, 0},
    {"kl_div_pair_loss", math::kFormula<math::Divergence>, 4, true, false, false, 2, 0.5},
    {"gaussian_kl_div", math::kFormula<math::StandardDivergence>, 2, true, true, false, 1, 0},
    {"gaussian_kl_div", math::kFormula<math::Divergence>, 4, true, true, false, 1, 0},
    {"normal_kl_div", math::kFormula<math::StandardNormalDivergence>, 2, false, true, true, 1, 0},
    {"normal_kl_div", math::kFormula<math::NormalDivergence>, 4, false, true, true, 1, 0},
};

enum WeightKind { kNone, kNumbers, kBools };
constexpr const char* kWeightNames[] = {"unweighted", "weighted", "masked"};

enum Stream { kOfZeros = 8, kOfWeights, kOfGradients };

// In (-1, 1).
double random_number(std::uint64_t stream, std::uint64_t n) {
  std::uint64_t z = ((stream << 32) + n + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(static_cast<std::int64_t>(z) >> 11) * 0x1p-52;
}

constexpr double kSpecial[] = {0.0,   -0.0, NAN,   HUGE_VAL, -HUGE_VAL, 1e-45,  -5e-324,
                               1e-40, 3e38, -3e38, 1e300,    88.8,      -104.0, 709.9};

double input_number(const Operator& op, int input, bool with_special, std::int64_t n) {
  if (with_special && (n + 5 * input) % 23 == 0) {
    return kSpecial[n / 23 % 14];
  }
  const double number = random_number(input, n);
  const int exponent = static_cast<int>(n % 16);
  return op.has_deviations && input % 2 == 1 ? std::ldexp(1.5 + 0.5 * number, 4 - exponent / 2)
                                             : std::ldexp(number, 5 - exponent);
}

double weight_number(std::int64_t n) { return random_number(kOfZeros, n) < 0 ? 0.0 : random_number(kOfWeights, n); }

// Tensors of a storage, and what the library does around its kernels.

std::set<void (*)()> used;

template <class Kernel>
Kernel use(Kernel kernel) {
  used.insert(reinterpret_cast<void (*)()>(kernel));
  return kernel;
}

std::int64_t size_of(Storage storage) { return storage == kBool ? 1 : storage == kFloat64 ? 8 : storage == kFloat32 ? 4 : 2; }

Arithmetic arithmetic_of(Storage storage) { return storage == kFloat64 ? kDouble : kSingle; }
Storage storage_of(Arithmetic arithmetic) { return arithmetic == kDouble ? kFloat64 : kFloat32; }

struct Numbers {
  Numbers(Storage storage, std::int64_t numel) : storage(storage), numel(numel), bytes(numel * size_of(storage)) {}

  Tile tile() const { return {numel, 1, size_of(storage), 0}; }
  void* at(std::int64_t i) { return bytes.data() + i * size_of(storage); }
  const void* at(std::int64_t i) const { return bytes.data() + i * size_of(storage); }

  Storage storage;
  std::int64_t numel;
  std::vector<char> bytes;
};

Numbers loaded(const Numbers& from, Arithmetic arithmetic) {
  Numbers out(storage_of(arithmetic), from.numel);
  use(kernels.load[from.storage][arithmetic])(out.at(0), from.at(0), from.tile());
  return out;
}

Numbers stored(const Numbers& from, Storage storage) {
  Numbers out(storage, from.numel);
  use(kernels.store[storage][arithmetic_of(from.storage)])(out.at(0), from.at(0), out.tile());
  return out;
}

// Rounded to float32 before a half type, as torch does it.
template <class Number>
Numbers made(Storage storage, std::int64_t numel, const Number& number) {
  Numbers out(storage_of(arithmetic_of(storage)), numel);
  for (std::int64_t n = 0; n < numel; ++n) {
    const double wide = number(n);
    const float narrow = static_cast<float>(wide);
    out.storage == kFloat64 ? std::memcpy(out.at(n), &wide, 8) : std::memcpy(out.at(n), &narrow, 4);
  }
  return storage == kBool ? out : stored(out, storage);
}

Numbers repeated(const Numbers& row, std::int64_t rows) {
  Numbers out(row.storage, rows * row.numel);
  for (std::int64_t i = 0; i < rows; ++i) {
    std::memcpy(out.at(i * row.numel), row.at(0), row.bytes.size());
  }
  return out;
}

// Every NaN is one: processors differ in the bits of theirs.
std::vector<double> values_of(const Numbers& numbers) {
  std::vector<double> values(numbers.numel);
  use(kernels.load[numbers.storage][kDouble])(values.data(), numbers.at(0), numbers.tile());
  for (auto& value : values) {
    value = std::isnan(value) ? std::fabs(NAN) : value;
  }
  return values;
}

std::uint32_t crc32(const std::vector<double>& values) {
  std::uint32_t crc = ~0u;
  for (const double value : values) {
    std::uint64_t bits;
    std::memcpy(&bits, &value, 8);
    for (int bit = 0; bit < 64; ++bit) {
      const std::uint32_t difference = (crc ^ static_cast<std::uint32_t>(bits >> bit)) & 1u;
      crc = (crc >> 1) ^ (difference ? 0xedb88320u : 0u);
    }
  }
  return ~crc;
}

std::string about; // the call that is running

void require(bool holds, const std::string& what) {
  if (!holds) {
    std::fprintf(stderr, "%s: %s\n", about.c_str(), what.c_str());
    std::exit(1);
  }
}

void require_same(const Numbers& a, const Numbers& b, const std::string& what) {
  const auto left = values_of(a), right = values_of(b);
  require(std::memcmp(left.data(), right.data(), left.size() * 8) == 0, what + " differs");
}

void print(const char* result, const Numbers& numbers) {
  std::printf("%s %s %08x\n", about.c_str(), result, crc32(values_of(numbers)));
}

// A way to compute the terms of a call and what is made of them: kernels, null where there is none, and the inputs they take.
struct Way {
  const char* name;
  std::vector<Numbers> inputs; // the weight is the last
  ForwardKernel forward = nullptr;
  BackwardKernel backward = nullptr;
  Accumulate accumulate = nullptr;
  SumChunks sum_chunks = nullptr;
  SumRowChunks sum_row_chunks = nullptr;

  Storage storage() const { return inputs[0].storage; }
};

// The pointers and strides of outputs and inputs that have all terms.
struct Operands {
  Operands(const std::vector<Numbers*>& outputs, const std::vector<const Numbers*>& inputs, Shape shape) : shape(shape) {
    for (auto* output : outputs) {
      add(output->at(0), output->storage);
    }
    for (auto* input : inputs) {
      add(const_cast<void*>(input->at(0)), input->storage);
    }
  }

  void add(void* data, Storage storage) {
    pointers.push_back(data);
    strides.push_back(shape.columns * size_of(storage));
  }

  Block block() const { return {pointers.data(), strides.data(), shape.columns, shape.rows}; }

  Shape shape;
  std::vector<void*> pointers;
  std::vector<std::int64_t> strides;
};

std::vector<const Numbers*> pointers_to(const std::vector<Numbers>& numbers) {
  std::vector<const Numbers*> pointers;
  for (const auto& one : numbers) {
    pointers.push_back(&one);
  }
  return pointers;
}

std::vector<Numbers*> pointers_to(std::vector<Numbers>& numbers) {
  std::vector<Numbers*> pointers;
  for (auto& one : numbers) {
    pointers.push_back(&one);
  }
  return pointers;
}

// The sums of a summation's chunks become one, for each row.
Numbers finished(const Numbers& partials, std::int64_t rows) {
  Numbers sums(partials.storage, rows);
  use(kernels.sum_rows[arithmetic_of(partials.storage)])(sums.at(0), partials.at(0), rows, partials.numel / rows);
  return sums;
}

Numbers column_sums(const Numbers& terms, Shape shape) {
  const Arithmetic arithmetic = arithmetic_of(terms.storage);
  std::vector<Numbers> levels;
  for (const Numbers* of = &terms; levels.empty() || shape.rows > 1; of = &levels.back()) {
    const std::int64_t chunks = (shape.rows + math::kChunk - 1) / math::kChunk;
    Numbers next(terms.storage, chunks * shape.columns);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t first = chunk * math::kChunk;
      const std::int64_t rows = shape.rows - first < math::kChunk ? shape.rows - first : math::kChunk;
      Numbers lanes(terms.storage, math::kLanes * shape.columns);
      use(kernels.add_to_lanes[arithmetic])(lanes.at(0), of->at(first * shape.columns), 0, rows, shape.columns);
      use(kernels.fold_lanes[arithmetic])(lanes.at(0), math::kLanes, shape.columns);
      std::memcpy(next.at(chunk * shape.columns), lanes.at(0), shape.columns * size_of(terms.storage));
    }
    levels.reserve(4);
    levels.push_back(std::move(next));
    shape.rows = chunks;
  }
  return levels.back();
}

Numbers quotient(const Numbers& numbers, std::int64_t divisor) {
  Numbers out = numbers;
  use(kernels.divide[arithmetic_of(numbers.storage)])(out.at(0), out.numel, divisor);
  return out;
}

template <class T>
void divide_each(Numbers& numbers, const Numbers& divisors) {
  for (std::int64_t i = 0; i < numbers.numel; ++i) {
    *static_cast<T*>(numbers.at(i)) /= *static_cast<const T*>(divisors.at(i));
  }
}

Numbers quotient(const Numbers& numbers, const Numbers& divisors) {
  Numbers out = numbers;
  out.storage == kFloat64 ? divide_each<double>(out, divisors) : divide_each<float>(out, divisors);
  return out;
}

class Call {
 public:
  Call(const Operator& op, Storage storage, bool wide, WeightKind weight)
      : op_(op),
        storage_(storage),
        arithmetic_(arithmetic_of(storage)),
        wide_(wide),
        weight_(weight),
        of_((weight == kNone ? kernels.formulas : kernels.weighted)[op.formula]),
        settings_(wide ? Settings{-HUGE_VAL, HUGE_VAL, op.scale, op.offset} : Settings{-30.0, 20.0, op.scale, op.offset}) {
    about = std::string(op.name) + " " + std::to_string(op.inputs) + " " + kStorageNames[storage] + " " +
            (wide ? "wide " : "narrow ") + kWeightNames[weight];
  }

  void run() const {
    const auto special = inputs(kFlat, true);
    print("terms", terms(ways(special)));
    print_gradients("gradient", gradients(ways(special), grad(storage_), kFlat));
    check_one_grad(special);
    if (op_.reduces) {
      run_sums(ways(inputs(kFlat, false)));
    }
    if (op_.inputs == 4) {
      run_prior();
    }
    if (storage_ == kFloat64 && weight_ == kNone) {
      run_mixed();
    }
  }

 private:
  Storage wide_storage() const { return storage_of(arithmetic_); }
  bool has_given_q() const { return !wide_ && op_.inputs == 4 && of_.forward_given_q[arithmetic_] != nullptr; }

  Numbers grad(Storage storage) const {
    return made(storage, kTerms, [](std::int64_t n) { return random_number(kOfGradients, n); });
  }

  // q in the shape [columns] is the same for all rows.
  std::vector<Numbers> inputs(Shape shape, bool with_special) const {
    std::vector<Numbers> all;
    for (int i = 0; i < op_.inputs; ++i) {
      const bool is_shared = i >= 2 && shape.rows > 1;
      const auto number = [&](std::int64_t n) { return input_number(op_, i, with_special, n); };
      const Numbers own = made(storage_, is_shared ? shape.columns : kTerms, number);
      all.push_back(is_shared ? repeated(own, shape.rows) : own);
    }
    if (weight_ == kNumbers) {
      all.push_back(made(storage_, kTerms, weight_number));
    } else if (weight_ == kBools) {
      all.push_back(Numbers(kBool, kTerms));
      for (std::int64_t n = 0; n < kTerms; ++n) {
        *static_cast<bool*>(all.back().at(n)) = weight_number(n) != 0;
      }
    }
    return all;
  }

  // The first is there for everything but what a kernel does with numbers in their own storage.
  std::vector<Way> ways(const std::vector<Numbers>& given) const {
    const Storage wide = wide_storage();
    std::vector<Numbers> in;
    for (const auto& one : given) {
      in.push_back(loaded(one, arithmetic_));
    }
    std::vector<Way> all{{"in the arithmetic type", in, of_.forward[wide_][wide], of_.backward[wide_][wide],
                          of_.accumulate[wide_][arithmetic_], of_.sum_chunks[wide_][wide], of_.sum_row_chunks[wide_][wide]}};
    if (weight_ == kNone) {
      all.push_back({"in the storage", given, of_.forward[wide_][storage_], of_.backward[wide_][storage_], nullptr,
                     of_.sum_chunks[wide_][storage_], of_.sum_row_chunks[wide_][storage_]});
    }
    const auto& masked = kernels.masked[op_.formula];
    auto in_place = in;
    if (weight_ == kBools) {
      in_place.back() = given.back();
      all.push_back(
          {"masked", in_place, nullptr, nullptr, nullptr, masked.sum_chunks[wide_][wide], masked.sum_row_chunks[wide_][wide]});
    }
    if (has_given_q()) {
      all.push_back({"given q", with_q(in, kernels.formulas[op_.formula].prepare_q), of_.forward_given_q[arithmetic_], nullptr,
                     of_.accumulate_given_q[arithmetic_], of_.sum_chunks_given_q[arithmetic_],
                     of_.sum_row_chunks_given_q[arithmetic_]});
      all.push_back({"given q, backward", with_q(in, kernels.formulas[op_.formula].prepare_q_of_backward), nullptr,
                     of_.backward_given_q[arithmetic_]});
      if (weight_ == kBools) {
        all.push_back({"masked, given q", with_q(in_place, kernels.formulas[op_.formula].prepare_q), nullptr, nullptr, nullptr,
                       masked.sum_chunks_given_q[arithmetic_], masked.sum_row_chunks_given_q[arithmetic_]});
      }
    }
    return all;
  }

  // What depends on q alone comes after the inputs.
  std::vector<Numbers> with_q(std::vector<Numbers> in, const PrepareQ (&prepare)[kArithmetics]) const {
    Numbers prepared(wide_storage(), kTerms);
    use(prepare[arithmetic_])(prepared.at(0), in[3].at(0), kTerms, settings_);
    in.insert(in.begin() + 4, prepared);
    return in;
  }

  // What the ways to compute a result give, which is one.
  template <class Kernel, class Compute>
  Numbers agreed(const std::vector<Way>& ways, Kernel Way::* kernel, const char* what, const Compute& compute) const {
    const Numbers first = stored(compute(ways[0], use(ways[0].*kernel)), storage_);
    for (const auto& way : ways) {
      if (way.*kernel != nullptr) {
        const Numbers other = compute(way, use(way.*kernel));
        const bool is_rounded = other.storage == storage_;
        require_same(is_rounded ? other : stored(other, storage_), first, std::string(what) + ", " + way.name + ",");
      }
    }
    return first;
  }

  Numbers terms_by(const Way& way, ForwardKernel kernel) const {
    Numbers out(way.storage(), kTerms);
    kernel(Operands({&out}, pointers_to(way.inputs), kFlat).block(), settings_);
    return out;
  }

  Numbers terms(const std::vector<Way>& ways) const {
    return agreed(ways, &Way::forward, "terms", [&](const Way& way, ForwardKernel kernel) { return terms_by(way, kernel); });
  }

  std::vector<Numbers> gradients_by(const Way& way, const Numbers& grad, Shape shape) const {
    std::vector<Numbers> out(op_.inputs, Numbers(way.storage(), kTerms));
    auto in = pointers_to(way.inputs);
    in.insert(in.begin(), &grad);
    use(way.backward)(Operands(pointers_to(out), in, shape).block(), settings_);
    return out;
  }

  // grad: in the storage of the call.
  std::vector<Numbers> gradients(const std::vector<Way>& ways, const Numbers& grad, Shape shape) const {
    const Numbers wide = loaded(grad, arithmetic_);
    std::vector<Numbers> all;
    for (int i = 0; i < op_.inputs; ++i) {
      all.push_back(agreed(ways, &Way::backward, "gradients", [&](const Way& way, BackwardKernel) {
        return gradients_by(way, way.storage() == grad.storage ? grad : wide, shape)[i];
      }));
    }
    return all;
  }

  void print_gradients(const std::string& name, const std::vector<Numbers>& all) const {
    for (std::size_t i = 0; i < all.size(); ++i) {
      print((name + std::to_string(i)).c_str(), all[i]);
    }
  }

  // Kernels for one grad_output against those for many.
  void check_one_grad(const std::vector<Numbers>& given) const {
    if (weight_ != kNone) {
      return;
    }
    constexpr double kGrad = 0.75;
    const Numbers grad = made(storage_, kTerms, [](std::int64_t) { return kGrad; });
    const auto expected = gradients(ways(given), grad, kFlat);
    std::vector<Numbers> out(op_.inputs, Numbers(storage_, kTerms));
    use(of_.backward_of_one[wide_][storage_])(Operands(pointers_to(out), pointers_to(given), kFlat).block(), kGrad, settings_);
    for (int i = 0; i < op_.inputs; ++i) {
      require_same(out[i], expected[i], "gradients for one grad_output,");
    }
    if (storage_ != wide_storage() || !has_given_q()) {
      return;
    }
    const auto prior = inputs(kPrior, false);
    const auto to_lanes = with_q(prior, of_.prepare_q_of_backward);
    const auto terms = gradients(ways(prior), grad, kPrior);
    std::vector<Numbers> of_p(2, Numbers(storage_, kTerms)), lanes(2, Numbers(storage_, math::kLanes * kPrior.columns));
    use(of_.backward_to_lanes[arithmetic_])(Operands(pointers_to(of_p), pointers_to(to_lanes), kPrior).block(), lanes[0].at(0),
                                            lanes[1].at(0), math::kLanes, kGrad, settings_);
    for (int i = 0; i < 2; ++i) {
      require_same(of_p[i], terms[i], "gradients of p to lanes,");
      use(kernels.fold_lanes[arithmetic_])(lanes[i].at(0), math::kLanes, kPrior.columns);
      Numbers sums(storage_, kPrior.columns);
      std::memcpy(sums.at(0), lanes[i].at(0), sums.bytes.size());
      require_same(sums, column_sums(terms[2 + i], kPrior), "gradients of q to lanes,");
    }
  }

  Numbers sum_by(const Way& way, SumChunks kernel, Settings settings) const {
    Numbers partials(wide_storage(), (kTerms + math::kChunk - 1) / math::kChunk);
    kernel(partials.at(0), Operands({}, pointers_to(way.inputs), kFlat).block(), 0, kTerms, settings);
    return finished(partials, 1);
  }

  // Each chunk in two runs.
  Numbers accumulated_by(const Way& way, Accumulate kernel) const {
    Numbers partials(wide_storage(), (kTerms + math::kChunk - 1) / math::kChunk);
    for (std::int64_t chunk = 0; chunk < partials.numel; ++chunk) {
      Numbers lanes(wide_storage(), math::kLanes);
      const std::int64_t first = chunk * math::kChunk;
      const std::int64_t numel = kTerms - first < math::kChunk ? kTerms - first : math::kChunk;
      const std::int64_t run = 37;
      for (const auto& [from, count] : {std::pair(first, run), std::pair(first + run, numel - run)}) {
        std::vector<const void*> in;
        for (const auto& input : way.inputs) {
          in.push_back(input.at(from));
        }
        kernel(lanes.at(0), in.data(), static_cast<int>((from - first) % math::kLanes), count, settings_);
      }
      use(kernels.fold_lanes[arithmetic_])(lanes.at(0), math::kLanes, 1);
      std::memcpy(partials.at(chunk), lanes.at(0), size_of(partials.storage));
    }
    return finished(partials, 1);
  }

  Numbers row_sums_by(const Way& way, SumRowChunks kernel, Settings settings) const {
    const std::int64_t chunks = (kLongRows.columns + math::kChunk - 1) / math::kChunk;
    Numbers partials(wide_storage(), kLongRows.rows * chunks);
    kernel(partials.at(0), Operands({}, pointers_to(way.inputs), kLongRows).block(), 0, kTerms, settings);
    return finished(partials, kLongRows.rows);
  }

  void run_sums(const std::vector<Way>& ways) const {
    const auto sum =
        agreed(ways, &Way::sum_chunks, "sum", [&](const Way& way, SumChunks kernel) { return sum_by(way, kernel, settings_); });
    const auto accumulated = agreed(ways, &Way::accumulate, "accumulated sum",
                                    [&](const Way& way, Accumulate kernel) { return accumulated_by(way, kernel); });
    require_same(accumulated, sum, "accumulated sum");
    print("sum", sum);
    print("sum0", stored(column_sums(terms_by(ways[0], use(ways[0].forward)), kLongColumns), storage_));
    print("sum1", agreed(ways, &Way::sum_row_chunks, "sums of rows",
                         [&](const Way& way, SumRowChunks kernel) { return row_sums_by(way, kernel, settings_); }));
    const Numbers rows = row_sums_by(ways[0], use(ways[0].sum_row_chunks), settings_);
    print("batchmean", stored(quotient(sum_by(ways[0], use(ways[0].sum_chunks), settings_), kLongRows.rows), storage_));
    print("mean1",
          stored(weight_ == kNone ? quotient(rows, kLongRows.columns) : quotient(rows, sums_of_weights(ways[0])), storage_));
  }

  Numbers sums_of_weights(const Way& way) const {
    const auto& of = kernels.formulas[math::kFormula<math::Weight>];
    const Storage wide = wide_storage();
    const Way weight{"weights", {way.inputs.back()}, of.forward[1][wide], nullptr, of.accumulate[1][arithmetic_]};
    const Numbers rows = row_sums_by(weight, use(of.sum_row_chunks[1][wide]), settings_);
    const Numbers sum = sum_by(weight, use(of.sum_chunks[1][wide]), settings_);
    require_same(accumulated_by(weight, use(weight.accumulate)), sum, "accumulated sum of weights");
    require_same(terms_by(weight, use(weight.forward)), way.inputs.back(), "weight as a term");
    return rows;
  }

  void run_prior() const {
    const auto all = ways(inputs(kPrior, false));
    print("prior_terms", terms(all));
    const auto of_p = gradients(all, grad(storage_), kPrior);
    const auto wide = gradients_by(all[0], loaded(grad(storage_), arithmetic_), kPrior);
    for (int i = 0; i < 4; ++i) {
      print(("prior_gradient" + std::to_string(i)).c_str(), i < 2 ? of_p[i] : stored(column_sums(wide[i], kPrior), storage_));
    }
  }

  // Numbers of another storage in arithmetic of float64, but for the first input.
  void run_mixed() const {
    for (const Storage other : {kFloat16, kBFloat16, kFloat32}) {
      auto in = inputs(kFlat, true);
      for (int i = 1; i < op_.inputs; ++i) {
        const auto number = [&](std::int64_t n) { return input_number(op_, i, true, n); };
        in[i] = loaded(made(other, kTerms, number), kDouble);
      }
      const Numbers out = terms_by({"", in}, use(of_.forward[wide_][kFloat64]));
      print((std::string("terms_with_") + kStorageNames[other]).c_str(), stored(out, other));
    }
  }

  const Operator& op_;
  Storage storage_;
  Arithmetic arithmetic_;
  bool wide_;
  WeightKind weight_;
  const FormulaKernels& of_;
  Settings settings_;
};

// float64 has no business with arithmetic of float32, and gets through it all the same.
void check_float64_in_single() {
  about = "float64 in arithmetic of float32";
  const Numbers numbers = made(kFloat32, kTerms, [](std::int64_t n) { return random_number(0, n); });
  require_same(loaded(stored(numbers, kFloat64), kSingle), numbers, "a copy");
}

void require_all_used() {
  about = "the table of kernels";
  const auto* table = reinterpret_cast<void (*const*)()>(&kernels);
  for (std::size_t i = 0; i < sizeof(kernels) / sizeof(*table); ++i) {
    require(table[i] == nullptr || used.count(table[i]) == 1, "kernel " + std::to_string(i) + " was not run");
  }
}

} // namespace

int main() {
  for (const auto& op : kOperators) {
    for (const Storage storage : {kFloat16, kBFloat16, kFloat32, kFloat64}) {
      for (const bool wide : {false, true}) {
        for (const WeightKind weight : {kNone, kNumbers, kBools}) {
          if ((wide || op.clamps) && (weight == kNone || op.reduces)) {
            Call(op, storage, wide, weight).run();
          }
        }
      }
    }
  }
  check_float64_in_single();
  require_all_used();
}
