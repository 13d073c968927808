#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <optional>

namespace kl_ext {
namespace {

constexpr size_t kKiB = size_t{1} << 10;
constexpr size_t kMiB = size_t{1} << 20;
// Smaller results come from the C library, which keeps most of the memory they free.
constexpr size_t kSmallest = 128 * kKiB;
// Block sizes are multiples of kUnit, and from one huge page on multiples of kHugePage.
constexpr size_t kUnit = 32 * kKiB;
constexpr size_t kHugePage = 2 * kMiB;
// A larger block serves a result if at most 1 / kPartsUnused of the block stays unused.
constexpr size_t kPartsUnused = 4;

// The process keeps this much to itself; the system may take back what is kept beyond it.
constexpr size_t kNotOffered = 64 * kMiB;

size_t environment(const char* name, size_t value) {
  if (const char* const text = std::getenv(name)) {
    std::from_chars(text, text + std::strlen(text), value);
  }
  return value;
}

// Read only while the library is loaded: a thread that sets a variable may move the environment, and another thread that reads
// it then reads freed memory.
std::atomic<size_t> most_kept = environment("KL_EXT_KEEP_MEMORY", 512) * kMiB;
const bool kHugePages = environment("KL_EXT_HUGE_PAGES", 1) != 0;

struct Block {
  char* data;
  size_t size;
  bool is_offered = false; // the system may take it, and does only when memory runs short
};

// The size of a block is written this far before its data, at least a page: torch asks that what frees a storage needs no more
// than the address of the data, or the storage cannot be copied on write.
constexpr size_t kBefore = 64 * kKiB;

size_t& size_of(char* data) { return *reinterpret_cast<size_t*>(data - kBefore); }

// The size of the block that is made for a result of this many bytes.
size_t rounded(size_t size) {
  const size_t unit = size < kHugePage ? kUnit : kHugePage;
  return (size + unit - 1) / unit * unit;
}

// Address space, or nullptr if the system has none.
char* map(size_t size) {
  void* const mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return mapped == MAP_FAILED ? nullptr : static_cast<char*>(mapped);
}

// The data of a block of ordinary pages, or nullptr.
char* map_ordinary(size_t size) {
  char* const start = map(kBefore + size);
  return start == nullptr ? nullptr : start + kBefore;
}

// Huge pages where they are available. Aligned to them in any case.
char* map_huge(size_t size) {
  char* const start = map(kBefore + size + kHugePage);
  if (start == nullptr) {
    return nullptr;
  }
  const auto earliest = reinterpret_cast<std::uintptr_t>(start + kBefore);
  const size_t skipped = (kHugePage - earliest % kHugePage) % kHugePage;
  char* const used = start + skipped;
  if (skipped > 0) {
    munmap(start, skipped);
  }
  if (skipped < kHugePage) {
    munmap(used + kBefore + size, kHugePage - skipped);
  }
  if (kHugePages) {
    madvise(used, kBefore + size, MADV_HUGEPAGE); // best effort: an error changes nothing
  }
  return used + kBefore;
}

void unmap(const Block& block) { munmap(block.data - kBefore, kBefore + block.size); }

// The blocks that no tensor holds. No thread waits for the lock: one that finds it taken maps or unmaps memory instead.
class Kept {
 public:
  // The smallest block that is large enough and not too large, if there is one. Of equal ones, the one given last, which may
  // still be in a cache.
  std::optional<Block> take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      return std::nullopt;
    }
    const auto smallest = by_size_.lower_bound(size);
    if (smallest == by_size_.end()) {
      return std::nullopt;
    }
    const size_t found = smallest->first;
    if (found != rounded(size) && found - size > found / kPartsUnused) {
      return std::nullopt;
    }
    return remove(std::prev(by_size_.upper_bound(found)));
  }

  void give(const Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      return unmap(block);
    }
    Blocks one;
    try {
      one.push_back(block);
      by_size_.emplace(block.size, one.begin());
    } catch (const std::bad_alloc&) { // a tensor that goes has nobody to tell
      return unmap(block);
    }
    recent_.splice(recent_.end(), one);
    size_ += block.size;
    recent_size_ += block.size;
    while (size_ > most_kept) {
      const Block& oldest = (offered_.empty() ? recent_ : offered_).front();
      unmap(remove(by_size_.lower_bound(oldest.size)));
    }
    offer();
  }

 private:
  using Blocks = std::list<Block>;                        // in the order given
  using BySize = std::multimap<size_t, Blocks::iterator>; // equal sizes in the order given

  // Offers all but the last blocks to the system: offering a block and writing to it again costs as much as a small result.
  void offer() {
    while (recent_size_ > kNotOffered) {
      Block& block = recent_.front();
      block.is_offered = true;
      madvise(block.data, block.size, MADV_FREE); // best effort: an error changes nothing
      recent_size_ -= block.size;
      offered_.splice(offered_.end(), recent_, recent_.begin());
    }
  }

  Block remove(BySize::iterator entry) {
    const auto [data, size, is_offered] = *entry->second;
    (is_offered ? offered_ : recent_).erase(entry->second);
    by_size_.erase(entry);
    size_ -= size;
    recent_size_ -= is_offered ? 0 : size;
    return {data, size};
  }

  std::mutex mutex_;
  Blocks offered_;
  Blocks recent_; // given after the offered ones
  BySize by_size_;
  size_t size_ = 0; // of both lists
  size_t recent_size_ = 0;
};

// Never destroyed: tensors may outlive static objects. Made while the library is loaded: a static in a function is guarded by a
// lock, which a fork during the first call would leave held.
Kept& kept = *new Kept;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    std::optional<Block> block = kept.take(size);
    if (!block) {
      const size_t whole = rounded(size);
      char* const data = whole < kHugePage ? map_ordinary(whole) : map_huge(whole);
      if (data == nullptr) {
        return c10::GetCPUAllocator()->allocate(size); // which reports the error
      }
      size_of(data) = whole;
      block = Block{data, whole};
    }
    c10::profiledCPUMemoryReporter().New(block->data, size);
    return {block->data, block->data, &release, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  static void release(void* context) {
    char* const data = static_cast<char*>(context);
    c10::profiledCPUMemoryReporter().Delete(data);
    kept.give({data, size_of(data)});
  }
};

Allocator allocator;

// Whether we allocate a result of this many bytes: it must be large, and torch's own allocator in charge. Where nothing is
// kept, only huge pages are an improvement on the C library.
bool is_ours(int64_t nbytes) {
  const auto size = static_cast<size_t>(nbytes);
  return size >= kSmallest && (size >= kHugePage || most_kept > 0) && c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator();
}

constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

} // namespace

at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  if (!options.device().is_cpu()) {
    return at::empty(sizes, options.memory_format(format));
  }
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (is_ours(c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype)))) {
    return at::Tensor(at::detail::empty_generic(sizes, &allocator, kCpu, dtype, format));
  }
  return at::Tensor(at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format));
}

at::Tensor allocate_like(const at::Tensor& tensor) {
  if (!tensor.is_cpu() || !is_ours(static_cast<int64_t>(tensor.nbytes()))) {
    return at::empty_like(tensor);
  }
  const at::DimVector strides = tensor.is_non_overlapping_and_dense()
                                    ? at::DimVector(tensor.strides())
                                    : at::DimVector(at::infer_dense_strides(tensor.sizes(), tensor.strides()));
  return at::Tensor(at::detail::empty_strided_generic(tensor.sizes(), strides, &allocator, kCpu, tensor.scalar_type()));
}

} // namespace kl_ext

// Sets how many MiB are kept and returns the previous value. For benchmarks, which compare settings in one process.
extern "C" __attribute__((visibility("default"))) std::uint64_t kl_ext_keep_memory(std::uint64_t mib) {
  return kl_ext::most_kept.exchange(mib * kl_ext::kMiB) / kl_ext::kMiB;
}
