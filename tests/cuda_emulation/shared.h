// An array that the threads of a block share, as a proxy that looks at every access: no two threads may access the same number,
// one of them to write it, without a barrier between; nothing may be read that no thread of the block has written; nothing
// beyond the array may be accessed. Shuffles order nothing: CUDA does not promise it either.
#pragma once

#include <concepts>
#include <vector>

#include "fault.h"

namespace kl_ext::emulation {

struct Access {
  std::uint32_t thread = 0;
  std::uint32_t epoch = 0; // the barriers that the block has passed, from 1 on; 0: never
  Site site;

  bool conflicts(std::uint32_t now) const { return epoch == now && thread != threadIdx.x; }
};

inline std::string to_string(const Access& access) {
  return "thread " + std::to_string(access.thread) + " at " + to_string(access.site);
}

template <class T>
class SharedArray {
 public:
  SharedArray(const char* name, std::size_t size, const std::uint32_t& epoch) : name_(name), cells_(size), epoch_(epoch) {}

  T read(std::int64_t index, const Site& site) {
    Cell& cell = at(index, site);
    if (cell.written.epoch == 0) {
      fail(site, "reads " + to_string(index) + ", which no thread has written");
    }
    if (cell.written.conflicts(epoch_)) {
      fail(site, "reads " + to_string(index) + " with no barrier after the write of " + emulation::to_string(cell.written));
    }
    // Two readers suffice for each thread to find another.
    if (cell.read[0].epoch != epoch_) {
      cell.read[0] = {threadIdx.x, epoch_, site};
    } else if (cell.read[0].thread != threadIdx.x) {
      cell.read[1] = {threadIdx.x, epoch_, site};
    }
    return cell.value;
  }

  void write(std::int64_t index, T value, const Site& site) {
    Cell& cell = at(index, site);
    if (cell.written.conflicts(epoch_)) {
      fail(site, "writes " + to_string(index) + " with no barrier after the write of " + emulation::to_string(cell.written));
    }
    for (const Access& read : cell.read) {
      if (read.conflicts(epoch_)) {
        fail(site, "writes " + to_string(index) + " with no barrier after the read of " + emulation::to_string(read));
      }
    }
    cell.value = value;
    cell.written = {threadIdx.x, epoch_, site};
  }

 private:
  struct Cell {
    T value;
    Access written;
    Access read[2];
  };

  std::string to_string(std::int64_t index) const { return std::string(name_) + "[" + std::to_string(index) + "]"; }

  Cell& at(std::int64_t index, const Site& site) {
    if (index < 0 || index >= static_cast<std::int64_t>(cells_.size())) {
      fail(site, "accesses " + to_string(index) + ", beyond its " + std::to_string(cells_.size()) + " numbers");
    }
    return cells_[static_cast<std::size_t>(index)];
  }

  const char* name_;
  std::vector<Cell> cells_;
  const std::uint32_t& epoch_;
};

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
    Number(SharedArray<T>& array, std::int64_t index, const Site& site) : array_(array), index_(index), site_(site) {}

    operator T() const { return array_.read(index_, site_); }

    const Number& operator=(T value) const {
      array_.write(index_, value, site_);
      return *this;
    }
    const Number& operator=(const Number& other) const { return *this = static_cast<T>(other); }
    const Number& operator+=(T value) const { return *this = *this + value; }

   private:
    SharedArray<T>& array_;
    std::int64_t index_;
    Site site_;
  };

  explicit SharedPointer(SharedArray<T>& array, std::int64_t offset = 0) : array_(&array), offset_(offset) {}

  Number operator[](const Place& place) const { return {*array_, offset_ + place.index, place.site}; }

  SharedPointer operator+(std::integral auto count) const {
    return SharedPointer(*array_, offset_ + static_cast<std::int64_t>(count));
  }

 private:
  SharedArray<T>* array_;
  std::int64_t offset_;
};

} // namespace kl_ext::emulation
