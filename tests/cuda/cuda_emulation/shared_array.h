// An array that the threads of a block share, and who has accessed it: no two threads may access the same number, one of them
// to write it, without a barrier between; nothing may be read that no thread of the block has written; nothing beyond the array
// may be accessed. Shuffles order nothing: CUDA does not promise it either.
#pragma once

#include <vector>

#include "fault.h"

namespace kl_ext::emulation {

inline std::string to_string(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

struct Access {
  std::uint32_t thread = 0;
  std::uint32_t epoch = 0; // the barriers that the block has passed, from 1 on; 0: never
  Site site;

  bool conflicts(std::uint32_t now) const { return epoch == now && thread != threadIdx.x; }
};

inline std::string to_string(const Access& access) {
  return "thread " + std::to_string(access.thread) + " at " + to_string(access.site);
}

class SharedArray {
 public:
  SharedArray(const char* name, std::size_t size, const std::uint32_t& epoch) : name_(name), cells_(size), epoch_(epoch) {}

  std::uint64_t read(std::int64_t index, const Site& site) {
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
    return cell.bits;
  }

  void write(std::int64_t index, std::uint64_t bits, const Site& site) {
    Cell& cell = at(index, site);
    if (cell.written.conflicts(epoch_)) {
      fail(site, "writes " + to_string(index) + " with no barrier after the write of " + emulation::to_string(cell.written));
    }
    for (const Access& read : cell.read) {
      if (read.conflicts(epoch_)) {
        fail(site, "writes " + to_string(index) + " with no barrier after the read of " + emulation::to_string(read));
      }
    }
    cell.bits = bits;
    cell.written = {threadIdx.x, epoch_, site};
  }

 private:
  struct Cell {
    std::uint64_t bits;
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

} // namespace kl_ext::emulation
