// What every fuzz target has: a check that ends the program, and the bytes that it makes its input of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CHECK(condition) (static_cast<bool>(condition) ? void() : fail(__FILE__, __LINE__, #condition))

namespace {

[[noreturn]] void fail(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: expected %s\n", file, line, condition);
  std::abort();
}

// The bytes of an input, and zeros after them.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}

  template <class Number = std::uint64_t>
  Number next() {
    Number number{};
    const auto size = std::min<std::size_t>(sizeof number, end_ - at_);
    std::memcpy(&number, at_, size);
    at_ += size;
    return number;
  }

  // From 0 to n - 1; few bytes where n is small.
  std::int64_t below(std::int64_t n) {
    return n <= 256 ? next<std::uint8_t>() % n : static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(n));
  }

  bool flip() { return below(2) == 1; }

  // From 1 to most: small, near a power of two, or anything.
  std::int64_t size(std::int64_t most) {
    const std::int64_t kind = below(4);
    const std::int64_t size = kind == 0   ? 1 + below(9)
                              : kind == 3 ? 1 + below(most)
                                          : (std::int64_t{1} << below(36)) + below(3) - 1;
    return std::clamp<std::int64_t>(size, 1, most);
  }

 private:
  const std::uint8_t* at_;
  const std::uint8_t* end_;
};

} // namespace
