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

inline bool operator==(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

inline std::string to_string(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

// Thrown by the thread at fault. It ends the launch, whose caller catches it.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The kernel that runs.
inline std::string kernel_name;

[[noreturn]] inline void fail(const Site& site, const std::string& what) {
  throw Fault(to_string(site) + ": " + what + "\n  in block " + std::to_string(blockIdx.x) + ", thread " +
              std::to_string(threadIdx.x) + " of " + kernel_name);
}

// The name of a function, template arguments included, as g++ ("... [with auto function = NAME; ...]") and clang write it.
template <auto function>
std::string name_of() {
  const std::string pretty = __PRETTY_FUNCTION__;
  const std::size_t start = pretty.find("function = ") + std::strlen("function = ");
  return pretty.substr(start, std::min(pretty.rfind(';'), pretty.rfind(']')) - start);
}

} // namespace kl_ext::emulation
