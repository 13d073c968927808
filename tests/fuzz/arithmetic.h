// The fuzz targets for numbers: conversions of half types, and the order of sums.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "bytes.h"
#include "cpu/numbers.h"
#include "cpu/sums.h"

namespace {

using namespace kl_ext;

// Small numbers, neighbours of a midpoint between half numbers, or any bits at all, infinities and NaN included.
template <class T>
T next_number(Bytes& bytes) {
  using Bits = typename math::Format<T>::Bits;
  switch (bytes.below(4)) {
    case 0:
      return static_cast<T>(bytes.below(256) - 128) / 8;
    case 1: {
      const T midpoint = math::from_bits<T>(bytes.next<Bits>() >> (math::Format<T>::kMantissaBits - 11)
                                                                      << (math::Format<T>::kMantissaBits - 11));
      return math::from_bits<T>(math::to_bits(midpoint) + static_cast<Bits>(bytes.below(3) - 1));
    }
    case 2: // where float16 has numbers
      return std::ldexp(T(1) + static_cast<T>(bytes.next<std::uint32_t>()) * T(0x1p-32),
                        static_cast<int>(bytes.below(50)) - 30) *
             (bytes.flip() ? 1 : -1);
    default:
      return math::from_bits<T>(bytes.next<Bits>());
  }
}

// Equal bits, except that one NaN is like another.
template <class T>
bool same(T a, T b) {
  return (a != a && b != b) || std::memcmp(&a, &b, sizeof a) == 0;
}

// Half types: the value that 16 bits stand for, by their fields; and the nearest bits to a number, by search.

template <class S>
constexpr int kMantissa = std::is_same_v<S, math::Half> ? 10 : 7;
template <class S>
constexpr int kBias = std::is_same_v<S, math::Half> ? 15 : 127;
template <class S>
constexpr int kInfinityBits = 0x7fff >> kMantissa<S> << kMantissa<S>;

// Of a magnitude; that of infinity is what a larger exponent would mean.
template <class S>
double magnitude_of(int bits) {
  const int exponent = bits >> kMantissa<S>;
  const int mantissa = bits % (1 << kMantissa<S>)+(exponent > 0 ? 1 << kMantissa<S> : 0);
  return std::ldexp(mantissa, std::max(exponent, 1) - kBias<S> - kMantissa<S>);
}

template <class S>
double value_of(S number) {
  const int magnitude = number.bits & 0x7fff;
  const double value = magnitude > kInfinityBits<S>    ? std::nan("")
                       : magnitude == kInfinityBits<S> ? HUGE_VAL
                                                       : magnitude_of<S>(magnitude);
  return number.bits & 0x8000 ? -value : value;
}

inline double value_of(float number) { return number; }
inline double value_of(double number) { return number; }

template <class S>
S nearest(double x) {
  int low = 0;
  int high = kInfinityBits<S>;
  while (high - low > 1) { // magnitude_of(low) <= |x|, and < magnitude_of(high) unless that is infinity
    const int middle = (low + high) / 2;
    (magnitude_of<S>(middle) <= std::abs(x) ? low : high) = middle;
  }
  const double midpoint = (magnitude_of<S>(low) + magnitude_of<S>(high)) / 2; // exact
  const bool up = std::abs(x) > midpoint || (std::abs(x) == midpoint && low % 2 == 1);
  return {static_cast<std::uint16_t>((up ? high : low) | (std::signbit(x) ? 0x8000 : 0))};
}

template <class S, class T>
void check_narrow(T x) {
  S out;
  math::narrow(out, x);
  CHECK(same(value_of(out), x != x ? std::nan("") : value_of(nearest<S>(x))));
}

template <class S>
void check_half(Bytes& bytes) {
  const S any{bytes.next<std::uint16_t>()};
  CHECK(same(static_cast<double>(math::widen(any)), value_of(any)));
  check_narrow<S>(next_number<float>(bytes));
  check_narrow<S>(next_number<double>(bytes));
}

// Tiles between tensors and buffers, and bfloat16 in pairs.
template <class S, class T>
void check_tile(Bytes& bytes) {
  cpu::Tile tile{1 + bytes.below(5), 1 + bytes.below(3), 0, 0};
  const std::int64_t apart = 1 + bytes.below(3);
  const std::int64_t sign = bytes.flip() ? 1 : -1;
  tile.column_stride = sign * apart * static_cast<std::int64_t>(sizeof(S));
  tile.row_stride = tile.column_stride * (tile.columns + bytes.below(3));
  std::vector<T> numbers(tile.rows * tile.columns);
  std::generate(numbers.begin(), numbers.end(), [&] { return next_number<T>(bytes); });
  std::vector<S> memory(8 * 3 * 3 * 2 + 1);
  char* const origin = reinterpret_cast<char*>(memory.data() + memory.size() / 2);
  cpu::DEFAULT::store<S, T>(origin, numbers.data(), tile);
  const auto at = [&](std::int64_t row, std::int64_t column) {
    S number;
    std::memcpy(&number, origin + row * tile.row_stride + column * tile.column_stride, sizeof number);
    return number;
  };
  for (std::int64_t i = 0; i < tile.rows * tile.columns; ++i) {
    S expected;
    math::narrow(expected, numbers[i]);
    CHECK(same(value_of(at(i / tile.columns, i % tile.columns)), value_of(expected)));
  }
  tile.column_stride *= bytes.flip() ? 1 : 0;
  tile.row_stride *= bytes.flip() ? 1 : 0;
  cpu::DEFAULT::load<S, T>(numbers.data(), origin, tile);
  for (std::int64_t i = 0; i < tile.rows * tile.columns; ++i) {
    CHECK(same(static_cast<double>(numbers[i]),
               static_cast<double>(static_cast<T>(value_of(at(i / tile.columns, i % tile.columns))))));
  }
}

void check_pair(Bytes& bytes) {
  const math::BFloat16 pair[2] = {{bytes.next<std::uint16_t>()}, {bytes.next<std::uint16_t>()}};
  float numbers[2];
  cpu::DEFAULT::read_group(numbers, pair);
  math::BFloat16 out[2];
  for (int i = 0; i < 2; ++i) {
    CHECK(same<double>(numbers[i], value_of(pair[i])));
    const float any = next_number<float>(bytes);
    numbers[i] = any != any ? 1.0f : any; // a NaN of bfloat16 numbers has 16 bits
  }
  cpu::DEFAULT::write_group(out, numbers);
  for (int i = 0; i < 2; ++i) {
    CHECK(same(value_of(out[i]), value_of(nearest<math::BFloat16>(numbers[i]))));
  }
}

void halves(Bytes& bytes) {
  check_half<math::Half>(bytes);
  check_half<math::BFloat16>(bytes);
  check_pair(bytes);
  bytes.flip() ? check_tile<math::Half, float>(bytes) : check_tile<math::BFloat16, double>(bytes);
  bytes.flip() ? check_tile<float, double>(bytes) : check_tile<math::BFloat16, float>(bytes);
}

// Sums: the order of math/summation.h, word for word.

template <class T>
T ordered_sum(const std::vector<T>& terms) {
  if (terms.size() > 1024) {
    std::vector<T> sums;
    for (std::size_t first = 0; first < terms.size(); first += 1024) {
      sums.push_back(ordered_sum(std::vector<T>(terms.begin() + first, terms.begin() + std::min(first + 1024, terms.size()))));
    }
    return ordered_sum(sums);
  }
  T lanes[64] = {};
  for (std::size_t i = 0; i < terms.size(); ++i) {
    lanes[i % 64] += terms[i];
  }
  for (int half : {32, 16, 8, 4, 2, 1}) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

// A formula whose terms are its input.
struct Identity {
  static constexpr int kInputs = 1;
  static constexpr bool kIsMasked = false;

  template <math::Range, class T>
  static T forward(const T (&values)[1], const math::Settings<T>&) {
    return values[0];
  }
};

// Few bytes make many numbers: a number in each lane or so is from the input, and the others follow from them.
template <class T>
std::vector<T> many_numbers(Bytes& bytes, std::int64_t count) {
  std::vector<T> numbers(count);
  auto state = bytes.next() | 1;
  const bool is_wild = bytes.below(8) == 0;
  for (auto& number : numbers) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    number = std::ldexp(static_cast<T>(static_cast<std::int32_t>(state >> 32)), static_cast<int>(state >> 27 & 15) - 40);
  }
  for (int i = 0; is_wild && i < 4; ++i) {
    numbers[bytes.below(count)] = next_number<T>(bytes);
  }
  return numbers;
}

template <class T>
std::vector<T> slice(const std::vector<T>& numbers, std::int64_t first, std::int64_t count, std::int64_t step = 1) {
  std::vector<T> some;
  for (std::int64_t i = 0; i < count; ++i) {
    some.push_back(numbers[first + i * step]);
  }
  return some;
}

// Plain numbers: rows at a time, and columns in pieces.
template <class T>
void check_plain_sums(Bytes& bytes) {
  const std::int64_t rows = 1 + bytes.below(4);
  const std::int64_t columns = bytes.size(1024);
  const auto numbers = many_numbers<T>(bytes, rows * columns);
  std::vector<T> sums(rows);
  cpu::DEFAULT::sum_rows<T>(sums.data(), numbers.data(), rows, columns);
  for (std::int64_t row = 0; row < rows; ++row) {
    CHECK(same(sums[row], ordered_sum(slice(numbers, row * columns, columns))));
  }
  // The same numbers as columns of [columns, rows].
  std::vector<T> lanes(math::kLanes * rows);
  for (std::int64_t done = 0; done < columns;) {
    const std::int64_t run = 1 + bytes.below(std::min<std::int64_t>(columns - done, 200));
    cpu::DEFAULT::add_to_lanes<T>(lanes.data(), numbers.data() + done * rows, done % math::kLanes, run, rows);
    done += run;
  }
  cpu::DEFAULT::fold_lanes<T>(lanes.data(), math::lanes_in_use(columns), rows);
  for (std::int64_t row = 0; row < rows; ++row) {
    CHECK(same(lanes[row], ordered_sum(slice(numbers, row, columns, rows))));
  }
}

// Terms that are computed: S is the storage of the inputs.
template <class S>
void check_computed_sums(Bytes& bytes) {
  using T = typename cpu::DEFAULT::ArithmeticOf<S>::Type;
  constexpr auto kNarrow = math::Range::kNarrow;
  const std::int64_t columns = bytes.size(2500);
  const std::int64_t rows = 1 + bytes.below(1 + 3000 / columns);
  const std::int64_t pitch = columns + bytes.below(3);
  const auto numbers = many_numbers<T>(bytes, rows * pitch);
  std::vector<S> stored(rows * pitch);
  std::vector<T> terms; // of all rows
  for (std::int64_t i = 0; i < rows * pitch; ++i) {
    math::narrow(stored[i], numbers[i]);
    if (i % pitch < columns) {
      terms.push_back(static_cast<T>(value_of(stored[i])));
    }
  }
  void* const pointer = stored.data();
  const std::int64_t row_stride = pitch * static_cast<std::int64_t>(sizeof(S));
  const cpu::Block block{&pointer, &row_stride, columns, rows};
  const cpu::Settings settings{-1.0, 1.0};
  const std::int64_t numel = rows * columns;

  std::vector<T> partials(numel / 1024 + rows * (columns / 1024 + 1) + 1);
  const std::int64_t begin = 1024 * bytes.below(numel / 1024 + 1);
  cpu::DEFAULT::sum_chunks<Identity, kNarrow, S>(partials.data(), block, begin, numel, settings);
  for (std::int64_t start = begin; start < numel; start += 1024) {
    CHECK(
        same(partials[(start - begin) / 1024], ordered_sum(slice(terms, start, std::min<std::int64_t>(1024, numel - start)))));
  }
  cpu::DEFAULT::sum_row_chunks<Identity, kNarrow, S>(partials.data(), block, 0, numel, settings);
  auto partial = partials.begin();
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t start = 0; start < columns; start += 1024) {
      CHECK(same(*partial++, ordered_sum(slice(terms, row * columns + start, std::min<std::int64_t>(1024, columns - start)))));
    }
  }
  // All of them, level after level.
  cpu::DEFAULT::sum_chunks<Identity, kNarrow, S>(partials.data(), block, 0, numel, settings);
  T sum;
  cpu::DEFAULT::sum_rows<T>(&sum, partials.data(), 1, (numel + 1023) / 1024);
  CHECK(same(sum, ordered_sum(terms)));
}

template <class T>
void check_accumulate(Bytes& bytes) {
  const std::int64_t numel = bytes.size(1024);
  const auto terms = many_numbers<T>(bytes, numel);
  T lanes[math::kLanes] = {};
  for (std::int64_t done = 0; done < numel;) {
    const std::int64_t run = 1 + bytes.below(std::min<std::int64_t>(numel - done, 256));
    const void* const input = terms.data() + done;
    cpu::DEFAULT::accumulate<Identity, math::Range::kNarrow, T>(lanes, &input, done % math::kLanes, run, {-1.0, 1.0});
    done += run;
  }
  cpu::DEFAULT::fold_lanes<T>(lanes, math::kLanes, 1);
  CHECK(same(lanes[0], ordered_sum(terms)));
}

void sums(Bytes& bytes) {
  switch (bytes.below(8)) {
    case 0:
      return check_plain_sums<float>(bytes);
    case 1:
      return check_plain_sums<double>(bytes);
    case 2:
      return check_accumulate<float>(bytes);
    case 3:
      return check_accumulate<double>(bytes);
    case 4:
      return check_computed_sums<math::Half>(bytes);
    case 5:
      return check_computed_sums<math::BFloat16>(bytes);
    case 6:
      return check_computed_sums<float>(bytes);
    default:
      return check_computed_sums<double>(bytes);
  }
}

} // namespace
