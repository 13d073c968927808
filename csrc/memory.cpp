#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace kl_ext {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
// Of a huge page, of which blocks are made. Smaller results are the C library's, which keeps what is freed of them.
constexpr size_t kPage = 2 * kMiB;
// A block serves results that leave at most one part in so many of it unused.
constexpr size_t kPartsUnused = 4;

// Kept by the process, where there is so much; what is kept beyond it, the system may take.
constexpr size_t kNotOffered = 64 * kMiB;

size_t environment(const char* name, size_t value) {
  if (const char* const text = std::getenv(name)) {
    std::from_chars(text, text + std::strlen(text), value);
  }
  return value;
}

struct Block {
  char* data;
  size_t size;
  bool is_offered = false; // to the system, which may take it, and does only where it must
};

// Aligned to huge pages; none where the system has no memory.
char* map(size_t size) {
  void* const mapped = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return nullptr;
  }
  char* const start = static_cast<char*>(mapped);
  char* const data = start + (kPage - reinterpret_cast<std::uintptr_t>(start) % kPage) % kPage;
  if (data > start) {
    munmap(start, data - start);
  }
  if (data < start + kPage) {
    munmap(data + size, start + kPage - data);
  }
  static const bool huge = environment("KL_EXT_HUGE_PAGES", 1) != 0;
  if (huge) {
    madvise(data, size, MADV_HUGEPAGE); // best effort: an error changes nothing
  }
  return data;
}

void unmap(const Block& block) { munmap(block.data, block.size); }

// The blocks that no tensor holds. Nobody waits for another thread here: who comes at the same moment does without.
class Kept {
 public:
  // The smallest block that is large enough and not too large, if there is one; of equal ones that given last, which may still
  // be in a cache.
  std::optional<Block> take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      return std::nullopt;
    }
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->size >= size && block->size - size <= block->size / kPartsUnused;
      best = fits && (best == blocks_.end() || block->size <= best->size) ? block : best;
    }
    if (best == blocks_.end()) {
      return std::nullopt;
    }
    const Block block{best->data, best->size};
    blocks_.erase(best);
    size_ -= block.size;
    return block;
  }

  void give(const Block& block) {
    const size_t most = environment("KL_EXT_KEEP_MEMORY", 512) * kMiB;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      return unmap(block);
    }
    blocks_.push_back(block);
    size_ += block.size;
    while (size_ > most) {
      unmap(blocks_.front());
      size_ -= blocks_.front().size;
      blocks_.erase(blocks_.begin());
    }
    offer();
  }

 private:
  // Offers all but those given last to the system: offering a block and writing to it again costs what a small result does.
  void offer() {
    size_t newer = 0;
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      newer += block->size;
      if (newer > kNotOffered && !block->is_offered) {
        block->is_offered = madvise(block->data, block->size, MADV_FREE) == 0;
      }
    }
  }

  std::mutex mutex_;
  std::vector<Block> blocks_; // the first was given first
  size_t size_ = 0;
};

// Never destroyed: tensors may outlive whatever ends with the process.
Kept& kept() {
  static Kept& kept = *new Kept;
  return kept;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const size_t rounded = (size + kPage - 1) / kPage * kPage;
    std::optional<Block> block = kept().take(rounded);
    if (!block) {
      char* const data = map(rounded);
      if (data == nullptr) {
        return c10::GetCPUAllocator()->allocate(size); // which says what there is to say
      }
      block = Block{data, rounded};
    }
    c10::profiledCPUMemoryReporter().New(block->data, size);
    return {block->data, new Block(*block), &release, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  static void release(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    kept().give(*block);
  }
};

Allocator allocator;

// Whether so many bytes on the CPU are ours to allocate: many, and with torch's own allocator in charge.
bool is_ours(int64_t nbytes) {
  return nbytes >= static_cast<int64_t>(kPage) && c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator();
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
