// The largest errors of the formulas in csrc/math, in ulps of the result: over every input of a kind, or found by climbing.
// exhaustive.py compiles this as the kernels are compiled, runs it, and judges what it prints with mpmath again.
//
//   search KIND LOW HIGH MEAN FIRST COUNT SEED THREADS
//
// LOW and HIGH clamp the log-variances, infinite bounds choose the wide range. MEAN is mu_p, where mu_q is 0. Inputs FIRST to
// FIRST + COUNT - 1 are bit patterns (of two half numbers, for their kinds); for "climb", COUNT is how many points to try.
//
// The true values are computed in double, in forms that do not cancel: to 100 roundings, 2^-22 ulp of a float32 result.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "math/half.h"
#include "math/normal.h"

namespace {

using namespace kl_ext::math;

constexpr int kBlock = 1024;
constexpr int kQuantities = 4;
constexpr std::uint64_t kChunk = std::uint64_t{1} << 22;

// Inputs in the order of the operators, results and true values of one block. An error is in ulps of the scale.
struct Block {
  alignas(64) float input[4][kBlock] = {};
  float got[kQuantities][kBlock];
  double exact[kQuantities][kBlock];
  double scale[kQuantities][kBlock];
  float error[kQuantities][kBlock];
};

struct Call {
  float low;
  float high;
  float mean;
};

// The last place of a type, the least exponent of its normal numbers, and the first power of two beyond it.
struct Rounding {
  std::int64_t mantissa_bits;
  std::int64_t least_exponent;
  double limit;
};

constexpr Rounding kFloat{23, -126, 0x1p128}, kBFloat16{7, -126, 0x1p128}, kHalf{10, -14, 0x1p16};

// e^x, e^x - 1 and e^x - 1 - x by the Taylor series of the rest after k ln 2. Where k is not 0 the last is above 0.05, and so
// loses less than 5 bits. Beyond 200 everything is beyond float32.
struct Exponential {
  double power;
  double minus_one;
  double phi;
};

KL_EXT_INLINE Exponential exponential(double x) {
  constexpr double kNearest = 0x1.8p52;
  const double below = x > 200 ? 200 : x;
  const double limited = below < -700 ? -700 : below;
  const double shifted = limited * 0x1.71547652b82fep0 + kNearest;
  const double k = shifted - kNearest;
  const double r = __builtin_fma(-k, 0x1.abc9e3b39803fp-56, __builtin_fma(-k, 0x1.62e42fefa39efp-1, limited));
  double series = 1 / 1307674368000.0;
  series = __builtin_fma(series, r, 1 / 87178291200.0);
  series = __builtin_fma(series, r, 1 / 6227020800.0);
  series = __builtin_fma(series, r, 1 / 479001600.0);
  series = __builtin_fma(series, r, 1 / 39916800.0);
  series = __builtin_fma(series, r, 1 / 3628800.0);
  series = __builtin_fma(series, r, 1 / 362880.0);
  series = __builtin_fma(series, r, 1 / 40320.0);
  series = __builtin_fma(series, r, 1 / 5040.0);
  series = __builtin_fma(series, r, 1 / 720.0);
  series = __builtin_fma(series, r, 1 / 120.0);
  series = __builtin_fma(series, r, 1 / 24.0);
  series = __builtin_fma(series, r, 1 / 6.0);
  series = __builtin_fma(series, r, 0.5);
  const double square = r * r * series;
  const double rest = r + square;
  const double scale = from_bits<double>((to_bits(shifted) + 1023) << 52);
  const double minus_one = k == 0 ? rest : __builtin_fma(scale, rest, scale - 1);
  return {__builtin_fma(scale, rest, scale), minus_one, k == 0 ? square : minus_one - below};
}

// (r^2 - 1) / 2 - ln r, by what r is off 1 where it is near 1. The series is that of artanh.
KL_EXT_INLINE double ratio_value(double r) {
  const double d = r - 1;
  const bool near = (d < 0.4) & (d > -0.3);
  const std::uint64_t bits = to_bits(r);
  const std::uint64_t shifted = bits - to_bits(0.7071067811865476);
  const std::int64_t k = static_cast<std::int64_t>(shifted) >> 52;
  const double power = static_cast<double>(static_cast<std::int32_t>(k));
  const double of_mantissa = from_bits<double>(bits - (static_cast<std::uint64_t>(k) << 52)) - 1;
  const double f = near ? d : of_mantissa;
  const double s = f / (2 + f), square = s * s;
  double series = 1 / 23.0;
  series = __builtin_fma(series, square, 1 / 21.0);
  series = __builtin_fma(series, square, 1 / 19.0);
  series = __builtin_fma(series, square, 1 / 17.0);
  series = __builtin_fma(series, square, 1 / 15.0);
  series = __builtin_fma(series, square, 1 / 13.0);
  series = __builtin_fma(series, square, 1 / 11.0);
  series = __builtin_fma(series, square, 1 / 9.0);
  series = __builtin_fma(series, square, 1 / 7.0);
  series = __builtin_fma(series, square, 1 / 5.0);
  series = __builtin_fma(series, square, 1 / 3.0);
  const double cube = 2 * s * square * series;
  const double beside_one = 0.5 * d * d + (d * d / (2 + d) - cube);
  const double elsewhere = 0.5 * d * (r + 1) - (power * 0.6931471805599453 + (2 * s + cube));
  return near ? beside_one : elsewhere;
}

// The gradient of log_var_q is in ulps of the larger of its two terms, and rounded to a narrower type in ulps of itself where
// that is larger still.
template <bool narrowed>
void true_pair(Block& block, Call call) {
  for (int i = 0; i < kBlock; ++i) {
    const double p = block.input[1][i], q = block.input[3][i], low = call.low, high = call.high;
    const double not_low_p = p < low ? low : p, not_low_q = q < low ? low : q;
    const double clamped_p = not_low_p > high ? high : not_low_p, clamped_q = not_low_q > high ? high : not_low_q;
    const double difference = static_cast<double>(block.input[0][i]) - block.input[2][i];
    const Exponential ratio = exponential(clamped_p - clamped_q);
    const double by_mean = difference * exponential(-clamped_q).power;
    const double square = 0.5 * difference * by_mean, slope = 0.5 * ratio.minus_one;
    const bool pass_p = (p >= low) & (p <= high), pass_q = (q >= low) & (q <= high);
    const double size = slope < 0 ? -slope : slope, larger = size > square ? size : square;
    const double of_result = slope + square > larger ? slope + square : larger;
    block.exact[0][i] = block.scale[0][i] = 0.5 * ratio.phi + square;
    block.exact[1][i] = block.scale[1][i] = by_mean;
    block.exact[2][i] = block.scale[2][i] = pass_p ? slope : 0;
    block.exact[3][i] = pass_q ? -(slope + square) : 0;
    block.scale[3][i] = pass_q ? (narrowed ? of_result : larger) : 0;
  }
}

// Against N(0, 1), and means that are 0. Infinity gives what the plain formula gives, NaN.
void true_single(Block& block, Call call) {
  for (int i = 0; i < kBlock; ++i) {
    const double p = block.input[1][i], low = call.low, high = call.high;
    const double not_low = p < low ? low : p;
    const Exponential ratio = exponential(not_low > high ? high : not_low);
    const bool pass = (p >= low) & (p <= high);
    block.exact[0][i] = block.scale[0][i] = (p == HUGE_VAL) & (high == HUGE_VAL) ? NAN : 0.5 * ratio.phi;
    block.exact[1][i] = block.scale[1][i] = pass ? 0.5 * ratio.minus_one : 0;
  }
}

// Of equal means and q = 1; 0, infinity and numbers that are no deviations give what docs/numbers.md has.
template <bool standard>
void true_ratio(Block& block) {
  for (int i = 0; i < kBlock; ++i) {
    const double p = block.input[1][i];
    const bool regular = (p > 0) & (p < HUGE_VAL);
    const double value = ratio_value(regular ? p : 1);
    const double invalid = p == 0 ? HUGE_VAL : NAN, deviation = p >= 0 ? p : NAN;
    block.exact[0][i] = block.scale[0][i] = regular ? value : invalid;
    const double slope = (deviation - 1) * (deviation + 1) / deviation;
    block.exact[1][i] = block.scale[1][i] = standard & (p == HUGE_VAL) ? HUGE_VAL : slope;
    block.exact[2][i] = block.scale[2][i] = -(deviation - 1) * (deviation + 1);
  }
}

// NaN and infinities have to be where they belong, values are not negative, and where the true result is 0 it is 0.
void judge(Block& block, int quantities, Rounding to) {
  for (int quantity = 0; quantity < quantities; ++quantity) {
    const double least = quantity == 0 ? 0 : -HUGE_VAL;
    for (int i = 0; i < kBlock; ++i) {
      const double got = block.got[quantity][i], exact = block.exact[quantity][i];
      const double size = exact < 0 ? -exact : exact;
      const bool infinite = (got == HUGE_VAL) | (got == -HUGE_VAL);
      const bool overflowed = infinite & (size >= to.limit) & ((got < 0) == (exact < 0));
      const double counted = infinite ? (got < 0 ? -to.limit : to.limit) : got;
      const double gap = counted < exact ? exact - counted : counted - exact;
      const std::int64_t field = (to_bits(block.scale[quantity][i]) >> 52) & 0x7ff;
      const std::int64_t lowest = 1023 + to.least_exponent;
      const std::int64_t exponent = field > lowest ? field : lowest;
      const double per_ulp = from_bits<double>(static_cast<std::uint64_t>(2046 + to.mantissa_bits - exponent) << 52);
      const double error = gap * per_ulp;
      const bool right = overflowed | ((got != got) & (exact != exact));
      const bool wrong = !(error >= 0) | (got < least) | ((exact == 0) & (got != 0));
      block.error[quantity][i] = static_cast<float>(right ? 0 : wrong ? HUGE_VAL : error);
    }
  }
}

template <class F, Range range, class S>
void measure(Block& block, Call call) {
  for (int i = 0; i < kBlock; ++i) {
    const Settings<float> settings{call.low, call.high};
    float input[F::kInputs], gradient[F::kInputs];
    for (int j = 0; j < F::kInputs; ++j) {
      input[j] = block.input[j][i];
    }
    S narrowed[4];
    narrow(narrowed[0], F::template forward<range>(input, settings));
    F::template backward<range>(1.0f, input, settings, gradient);
    if constexpr (F::kInputs == 2) {
      narrow(narrowed[1], gradient[1]);
      block.got[0][i] = widen(narrowed[0]);
      block.got[1][i] = widen(narrowed[1]);
    } else if constexpr (!F::kRanges) {
      narrow(narrowed[1], gradient[1]);
      narrow(narrowed[2], gradient[3]);
      block.got[0][i] = widen(narrowed[0]);
      block.got[1][i] = widen(narrowed[1]);
      block.got[2][i] = widen(narrowed[2]);
    } else {
      // The gradients of the two means are one, with opposite signs.
      const bool opposite = (gradient[2] == -gradient[0]) | (gradient[0] != gradient[0]);
      narrow(narrowed[1], opposite ? gradient[0] : not_a_number<float>());
      narrow(narrowed[2], gradient[1]);
      narrow(narrowed[3], gradient[3]);
      for (int j = 0; j < 4; ++j) {
        block.got[j][i] = widen(narrowed[j]);
      }
    }
  }
}

struct Kind {
  const char* name;
  int quantities;
  void (*evaluate)(Block&, Call);
  void (*widen_bits)(std::uint32_t, float&, float&); // to the inputs 1 and 3
};

void one_float(std::uint32_t bits, float& p, float&) { p = from_bits<float>(bits); }

template <class S>
void two_halves(std::uint32_t bits, float& p, float& q) {
  p = widen(S{static_cast<std::uint16_t>(bits >> 16)});
  q = widen(S{static_cast<std::uint16_t>(bits)});
}

template <class S, const Rounding& rounding>
void evaluate_pair(Block& block, Call call) {
  measure<Divergence, Range::kNarrow, S>(block, call);
  true_pair<sizeof(S) == 2>(block, call);
  judge(block, 4, rounding);
}

void evaluate_single(Block& block, Call call) {
  const bool wide = !(call.high <= kNarrowBound<float>);
  (wide ? measure<StandardDivergence, Range::kWide, float> : measure<StandardDivergence, Range::kNarrow, float>)(block, call);
  true_single(block, call);
  judge(block, 2, kFloat);
}

template <class F, int quantities>
void evaluate_normal(Block& block, Call call) {
  measure<F, Range::kNarrow, float>(block, call);
  true_ratio<F::kInputs == 2>(block);
  judge(block, quantities, kFloat);
}

constexpr Kind kKinds[] = {
    {"single", 2, evaluate_single, one_float},
    {"standard", 2, evaluate_normal<StandardNormalDivergence, 2>, one_float},
    {"ratio", 3, evaluate_normal<NormalDivergence, 3>, one_float},
    {"bfloat16", 4, evaluate_pair<BFloat16, kBFloat16>, two_halves<BFloat16>},
    {"float16", 4, evaluate_pair<Half, kHalf>, two_halves<Half>},
    {"climb", 4, evaluate_pair<float, kFloat>, nullptr},
};

struct Worst {
  float error = -1;
  float input[4] = {};
  float got = 0;
  std::uint64_t chunk = 0;
};

// Non-negative floats compare like their bits, and integers are compared in vectors.
void keep_worst(const Block& block, int quantities, std::uint64_t chunk, Worst* worst) {
  for (int quantity = 0; quantity < quantities; ++quantity) {
    std::uint32_t largest = 0;
    for (int i = 0; i < kBlock; ++i) {
      const std::uint32_t bits = to_bits(block.error[quantity][i]);
      largest = bits > largest ? bits : largest;
    }
    if (from_bits<float>(largest) > worst[quantity].error) {
      for (int i = kBlock - 1; i >= 0; --i) {
        if (to_bits(block.error[quantity][i]) == largest) {
          worst[quantity] = {from_bits<float>(largest), {}, block.got[quantity][i], chunk};
          for (int j = 0; j < 4; ++j) {
            worst[quantity].input[j] = block.input[j][i];
          }
        }
      }
    }
  }
}

struct Random {
  std::uint64_t state;

  std::uint64_t next() {
    state += 0x9e3779b97f4a7c15;
    std::uint64_t x = state;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  double uniform(double low, double high) { return low + (high - low) * static_cast<double>(next() >> 11) * 0x1p-53; }
  double sign() { return next() & 1 ? 1 : -1; }
  float nudge(float x) {
    const int by = static_cast<int>(next() % 9) - 4;
    return x == 0 ? x : from_bits<float>(to_bits(x) + static_cast<std::uint32_t>(by));
  }
};

// Points where arithmetic is worst: p next to q, multiples of ln 2 apart, at the clamp, terms of one size.
void start(Random& random, Call call, float (&input)[4]) {
  constexpr double kLn2 = 0.6931471805599453;
  float q = static_cast<float>(random.uniform(call.low, call.high));
  switch (random.next() % 4) {
    case 0:
      q = static_cast<float>(random.uniform(-3, 3));
      break;
    case 1:
      q = static_cast<float>(random.sign() * std::exp2(random.uniform(-40, 1)));
      break;
    case 2:
      q = random.nudge(random.next() & 1 ? call.low : call.high);
      break;
    default:
      break;
  }
  float p = static_cast<float>(random.uniform(call.low, call.high));
  switch (random.next() % 5) {
    case 0:
      p = random.nudge(q);
      break;
    case 1:
      p = random.nudge(static_cast<float>(q + kLn2 * (static_cast<double>(random.next() % 25) - 12)));
      break;
    case 2:
      p = static_cast<float>(q + random.sign() * std::exp2(random.uniform(-26, 0)));
      break;
    case 3:
      p = static_cast<float>(q + random.uniform(-2.5, 2.5));
      break;
    default:
      break;
  }
  const float mu_q = static_cast<float>(random.next() % 4 == 0 ? 0 : random.sign() * std::exp2(random.uniform(-12, 6)));
  const double d = static_cast<double>(p) - q;
  const double slope = std::fabs(std::expm1(d)) * std::exp(static_cast<double>(q)), phi = slope * std::fabs(d) / 2;
  double distance = std::sqrt(random.next() & 1 ? slope : phi) * random.uniform(0.3, 3);
  if (random.next() % 4 == 0) {
    distance = std::exp2(random.uniform(-30, 4));
  }
  input[0] = static_cast<float>(mu_q + random.sign() * distance);
  input[1] = p;
  input[2] = mu_q;
  input[3] = q;
}

// Changes some bits of some inputs, of every size from one ulp to an exponent.
void propose(const float (&from)[4][kBlock], float (&to)[4][kBlock], std::uint32_t* state) {
  constexpr std::uint32_t kOdd[] = {0x9e3779b1, 0x85ebca77, 0xc2b2ae3d, 0x27d4eb2f};
  for (int i = 0; i < kBlock; ++i) {
    std::uint32_t x = state[i];
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    state[i] = x;
    const std::uint32_t choice = x * 0x2c1b3c6d;
    const std::uint32_t shift = 4 + (((choice >> 16) * 28) >> 16);
    for (int j = 0; j < 4; ++j) {
      const float largest = j % 2 == 0 ? 1e15f : 50.0f;
      const std::uint32_t mixed = x * kOdd[j];
      const std::uint32_t amount = (mixed ^ (mixed >> 15)) >> shift;
      const std::uint32_t before = to_bits(from[j][i]);
      const std::uint32_t moved = before + (mixed & 2 ? amount : 0 - amount);
      const bool keep = ((choice >> j) & 1) != 0 || (moved & 0x7fffffff) > to_bits(largest);
      to[j][i] = from_bits<float>(keep ? before : moved);
    }
  }
}

// One climb of a block of points, a quarter of them for each quantity. At two thirds of the way, all of a quarter go on from
// its best.
constexpr int kSteps = 240;

void climb(Block& block, Call call, std::uint64_t seed, std::uint64_t round, Worst* worst) {
  static thread_local float best[4][kBlock], error[kBlock];
  static thread_local std::uint32_t state[kBlock];
  Random random{seed * 0xd1342543de82ef95 + round * 0x2545f4914f6cdd1d};
  for (int i = 0; i < kBlock; ++i) {
    float input[4];
    start(random, call, input);
    for (int j = 0; j < 4; ++j) {
      best[j][i] = input[j];
    }
    error[i] = -1;
    state[i] = static_cast<std::uint32_t>(random.next()) | 1;
  }
  for (int step = 0; step < kSteps; ++step) {
    if (step == 0) {
      std::memcpy(block.input, best, sizeof best);
    } else {
      propose(best, block.input, state);
    }
    evaluate_pair<float, kFloat>(block, call);
    keep_worst(block, 4, round, worst);
    for (int quantity = 0; quantity < 4; ++quantity) {
      for (int i = quantity * kBlock / 4; i < (quantity + 1) * kBlock / 4; ++i) {
        const bool better = block.error[quantity][i] >= error[i];
        error[i] = better ? block.error[quantity][i] : error[i];
        for (int j = 0; j < 4; ++j) {
          best[j][i] = better ? block.input[j][i] : best[j][i];
        }
      }
      if (step == kSteps * 2 / 3) {
        const int first = quantity * kBlock / 4;
        int top = first;
        for (int i = first; i < first + kBlock / 4; ++i) {
          top = error[i] > error[top] ? i : top;
        }
        for (int i = first; i < first + kBlock / 4; ++i) {
          error[i] = error[top];
          for (int j = 0; j < 4; ++j) {
            best[j][i] = best[j][top];
          }
        }
      }
    }
  }
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 9) {
    return 2;
  }
  const Kind* kind = nullptr;
  for (const Kind& candidate : kKinds) {
    kind = std::strcmp(candidate.name, argv[1]) == 0 ? &candidate : kind;
  }
  if (kind == nullptr) {
    return 2;
  }
  const Call call{std::strtof(argv[2], nullptr), std::strtof(argv[3], nullptr), std::strtof(argv[4], nullptr)};
  const std::uint64_t first = std::strtoull(argv[5], nullptr, 10), count = std::strtoull(argv[6], nullptr, 10);
  const std::uint64_t seed = std::strtoull(argv[7], nullptr, 10);
  const bool climbs = kind->widen_bits == nullptr;
  const std::uint64_t per_chunk = climbs ? std::uint64_t{kSteps} * kBlock : kChunk;
  const std::uint64_t chunks = (count + per_chunk - 1) / per_chunk;

  std::atomic<std::uint64_t> next = 0;
  std::mutex mutex;
  Worst overall[kQuantities];
  std::uint64_t evaluated = 0;
  const auto work = [&] {
    static thread_local Block block;
    for (std::uint64_t chunk = next++; chunk < chunks; chunk = next++) {
      Worst worst[kQuantities];
      std::uint64_t done = 0;
      if (climbs) {
        climb(block, call, seed, chunk, worst);
        done = per_chunk;
      } else {
        const std::uint64_t end = std::min(count, (chunk + 1) * kChunk);
        for (std::uint64_t at = chunk * kChunk; at < end; at += kBlock) {
          for (int i = 0; i < kBlock; ++i) {
            // A last block that is not full repeats the last input.
            const std::uint64_t index = first + (at + i < end ? at + i : end - 1);
            block.input[0][i] = call.mean;
            block.input[3][i] = std::strcmp(kind->name, "ratio") == 0 ? 1 : 0;
            kind->widen_bits(static_cast<std::uint32_t>(index), block.input[1][i], block.input[3][i]);
          }
          kind->evaluate(block, call);
          keep_worst(block, kind->quantities, chunk, worst);
          done += std::min<std::uint64_t>(kBlock, end - at);
        }
      }
      const std::lock_guard lock(mutex);
      evaluated += done;
      for (int quantity = 0; quantity < kind->quantities; ++quantity) {
        const Worst &mine = worst[quantity], &other = overall[quantity];
        if (mine.error > other.error || (mine.error == other.error && mine.chunk < other.chunk)) {
          overall[quantity] = mine;
        }
      }
      std::printf("done %llu\n", static_cast<unsigned long long>(evaluated));
      std::fflush(stdout);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < std::atoi(argv[8]); ++i) {
    threads.emplace_back(work);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (int quantity = 0; quantity < kind->quantities; ++quantity) {
    const Worst& worst = overall[quantity];
    std::printf("worst %a %a %a %a %a %a\n", worst.error, worst.got, worst.input[0], worst.input[1], worst.input[2],
                worst.input[3]);
  }
}
