// What stands for a pointer into an array that the threads of a block share: a proxy that lets the array look at every access.
#pragma once

#include <concepts>
#include <cstring>

#include "fault.h"

namespace kl_ext::emulation {

class SharedArray;

// The bits of a number.
std::uint64_t read_shared(SharedArray& array, std::int64_t index, const Site& site);
void write_shared(SharedArray& array, std::int64_t index, std::uint64_t bits, const Site& site);

// An index, and where in the source it stands.
struct Place {
  template <std::integral I>
  Place(I i, const Site& where = Site::current()) : index(static_cast<std::int64_t>(i)), site(where) {}

  std::int64_t index;
  Site site;
};

// What stands for a T* into the array.
template <class T>
class SharedPointer {
 public:
  class Number {
   public:
    Number(SharedArray& array, std::int64_t index, const Site& site) : array_(array), index_(index), site_(site) {}

    operator T() const {
      const std::uint64_t bits = read_shared(array_, index_, site_);
      T value;
      std::memcpy(&value, &bits, sizeof(T));
      return value;
    }

    const Number& operator=(T value) const {
      std::uint64_t bits = 0;
      std::memcpy(&bits, &value, sizeof(T));
      write_shared(array_, index_, bits, site_);
      return *this;
    }
    const Number& operator=(const Number& other) const { return *this = static_cast<T>(other); }
    const Number& operator+=(T value) const { return *this = *this + value; }

   private:
    SharedArray& array_;
    std::int64_t index_;
    Site site_;
  };

  explicit SharedPointer(SharedArray& array, std::int64_t offset = 0) : array_(&array), offset_(offset) {}

  Number operator[](const Place& place) const { return {*array_, offset_ + place.index, place.site}; }

  SharedPointer operator+(std::integral auto count) const {
    return SharedPointer(*array_, offset_ + static_cast<std::int64_t>(count));
  }

 private:
  SharedArray* array_;
  std::int64_t offset_;
};

} // namespace kl_ext::emulation
