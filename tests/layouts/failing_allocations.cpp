// Allocations that fail when a test wants it. Preloaded, so that it is asked before the C++ and C libraries are, by the
// libraries that are watched:
//
//   libkl_ext.so, _bindings      operator new, realloc, the growth of c10::SmallVector, mmap
//   libc10.so                    posix_memalign, where tensors get their memory
//
// What others allocate, Python and torch for themselves, is passed on.
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <torch/csrc/autograd/input_metadata.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <vector>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
}

namespace {

struct Range {
  std::uintptr_t begin, end;

  bool has(const void* address) const {
    const auto place = reinterpret_cast<std::uintptr_t>(address);
    return begin <= place && place < end;
  }
};

std::vector<Range>* watched = nullptr; // the code of libkl_ext.so and _bindings
Range torch_memory{};                  // that of libc10.so

bool is_watched(const void* caller) {
  if (watched == nullptr) {
    return false;
  }
  for (const Range& range : *watched) {
    if (range.has(caller)) {
      return true;
    }
  }
  return false;
}

// Which allocation is to fail: the one that makes this 0, and with it all that follow if they are to fail as well.
std::atomic<long> left{0};
std::atomic<bool> do_all_that_follow_fail{false};
std::atomic<bool> is_armed{false};
std::atomic<bool> only_injected{false};
std::atomic<long> asked{0};

bool fails() {
  if (!is_armed) {
    return false;
  }
  ++asked;
  const long now = --left;
  return now == 0 || (now < 0 && do_all_that_follow_fail);
}

bool fails_in(bool injected) { return injected == only_injected && fails(); }

// What the watched libraries have allocated and nobody has freed.
class Live {
 public:
  void add(void* block) {
    const Inside inside(*this);
    blocks_.insert(block);
  }

  // Whether it was one of them.
  bool remove(void* block) {
    if (is_inside) {
      return false;
    }
    const Inside inside(*this);
    return blocks_.erase(block) > 0;
  }

  long count() {
    const Inside inside(*this);
    return static_cast<long>(blocks_.size());
  }

 private:
  // The set allocates too: that is passed on.
  struct Inside {
    explicit Inside(Live& live) : lock(live.mutex_) { is_inside = true; }
    ~Inside() { is_inside = false; }
    std::lock_guard<std::mutex> lock;
  };

  static thread_local bool is_inside __attribute__((tls_model("initial-exec")));
  std::mutex mutex_;
  std::set<void*> blocks_;
};

thread_local bool Live::is_inside = false;
Live* live = nullptr;
std::atomic<long> mapped{0};   // bytes
std::atomic<long> injected{0}; // bytes

void* watched_new(size_t size, const void* caller) {
  const bool is_ours = is_watched(caller);
  void* const block = is_ours && fails_in(false) ? nullptr : __libc_malloc(size == 0 ? 1 : size);
  if (block == nullptr) {
    throw std::bad_alloc();
  }
  if (is_ours) {
    live->add(block);
  }
  return block;
}

int visit(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type == PT_LOAD && (part.p_flags & PF_X) != 0) {
      const std::uintptr_t begin = info->dlpi_addr + part.p_vaddr;
      const Range range{begin, begin + part.p_memsz};
      if (std::strstr(info->dlpi_name, "libkl_ext.so") != nullptr || std::strstr(info->dlpi_name, "/_bindings.") != nullptr) {
        watched->push_back(range);
      } else if (std::strstr(info->dlpi_name, "/libc10.so") != nullptr) {
        torch_memory = range;
      }
    }
  }
  return 0;
}

// In torch's place. Fails as torch's own allocator does.
struct Injected final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    TORCH_CHECK(!fails_in(true), "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", size, " bytes");
    injected += static_cast<long>(size);
    auto* const block = new Block{__libc_memalign(64, size == 0 ? 1 : size), static_cast<long>(size)};
    return {block->data, block, &release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

 private:
  struct Block {
    void* data;
    long size;
  };

  static void release(void* context) {
    auto* const block = static_cast<Block*>(context);
    injected -= block->size;
    __libc_free(block->data);
    delete block;
  }
};

Injected allocator;

} // namespace

void* operator new(size_t size) { return watched_new(size, __builtin_return_address(0)); }
void* operator new[](size_t size) { return watched_new(size, __builtin_return_address(0)); }

extern "C" {

void free(void* block) {
  if (live != nullptr && block != nullptr) {
    live->remove(block);
  }
  __libc_free(block);
}

void* realloc(void* block, size_t size) {
  const bool is_ours = is_watched(__builtin_return_address(0));
  if (is_ours && fails_in(false)) {
    return nullptr;
  }
  const bool was_live = live != nullptr && block != nullptr && live->remove(block);
  void* const result = __libc_realloc(block, size);
  if (result != nullptr && (was_live || is_ours)) {
    live->add(result);
  } else if (result == nullptr && was_live && size > 0) {
    live->add(block);
  }
  return result;
}

int posix_memalign(void** block, size_t alignment, size_t size) {
  const bool is_ours = torch_memory.has(__builtin_return_address(0));
  *block = is_ours && fails_in(false) ? nullptr : __libc_memalign(alignment, size);
  if (*block == nullptr) {
    return ENOMEM;
  }
  if (is_ours) {
    live->add(*block);
  }
  return 0;
}

// c10::SmallVectorBase<unsigned>::mallocForGrow
void* _ZN3c1015SmallVectorBaseIjE13mallocForGrowEmmRm(void* self, size_t least, size_t element, size_t& capacity) {
  using Function = void* (*)(void*, size_t, size_t, size_t&);
  static const auto next = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "_ZN3c1015SmallVectorBaseIjE13mallocForGrowEmmRm"));
  // torch notes the outputs of a node in a function that is noexcept: nobody can mend that from outside.
  const bool is_metadata = element == sizeof(torch::autograd::InputMetadata);
  const bool is_ours = !is_metadata && is_watched(__builtin_return_address(0));
  if (is_ours && fails_in(false)) {
    throw std::bad_alloc();
  }
  void* const block = next(self, least, element, capacity);
  if (is_ours) {
    live->add(block);
  }
  return block;
}

void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) noexcept {
  const bool is_ours = is_watched(__builtin_return_address(0));
  if (is_ours && fails_in(false)) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  const long result = syscall(SYS_mmap, address, size, protection, flags, file, offset);
  if (is_ours && result != -1) {
    mapped += static_cast<long>(size);
  }
  return reinterpret_cast<void*>(result);
}

int munmap(void* address, size_t size) noexcept {
  const bool is_ours = is_watched(__builtin_return_address(0));
  const long result = syscall(SYS_munmap, address, size);
  if (is_ours && result == 0) {
    mapped -= static_cast<long>(size);
  }
  return static_cast<int>(result);
}

// For the tests

// Once the libraries are loaded.
void watch() {
  auto* const found = new std::vector<Range>;
  found->reserve(8);
  live = new Live;
  watched = found;
  dl_iterate_phdr(visit, nullptr);
}

void inject(bool is_injected) {
  only_injected = is_injected;
  c10::SetCPUAllocator(is_injected ? &allocator : c10::GetDefaultCPUAllocator(), /*priority=*/255);
}

// From now on the n-th allocation fails, alone or with all that follow it.
void arm(long n, bool do_all_fail) {
  left = n;
  do_all_that_follow_fail = do_all_fail;
  asked = 0;
  is_armed = true;
}

// How many were asked for since, and whether those from now on count.
long asked_since(bool goes_on) {
  is_armed = goes_on;
  return asked;
}

long live_blocks() { return live->count(); }
long mapped_bytes() { return mapped; }
long injected_bytes() { return injected; }
}
