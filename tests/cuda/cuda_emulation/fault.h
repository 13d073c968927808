// What an emulated kernel does wrong, told with the kernel's name and the place in its source.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>

struct Index {
  std::uint32_t x;
};
inline Index blockIdx;
inline Index threadIdx;

namespace kl_ext::emulation {

using Site = std::source_location;

// Thrown by the thread at fault. It ends the launch, whose caller catches it.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const Site& site, const std::string& what);

// The name of a function, template arguments included, as g++ ("... [with auto function = NAME; ...]") and clang write it.
template <auto function>
std::string name_of() {
  const std::string pretty = __PRETTY_FUNCTION__;
  const std::size_t start = pretty.find("function = ") + std::strlen("function = ");
  return pretty.substr(start, std::min(pretty.rfind(';'), pretty.rfind(']')) - start);
}

} // namespace kl_ext::emulation
