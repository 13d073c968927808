// What is not a template of the emulation, so as to be compiled once.
#include "block.h"

namespace kl_ext::emulation {
namespace {

std::string kernel_name;

} // namespace

void fail(const Site& site, const std::string& what) {
  throw Fault(to_string(site) + ": " + what + "\n  in block " + std::to_string(blockIdx.x) + ", thread " +
              std::to_string(threadIdx.x) + " of " + kernel_name);
}

void set_order(int chosen, std::uint32_t seed) {
  order = static_cast<Order>(chosen);
  random_order.seed(seed);
}

void run_grid(const std::string& kernel, bool exchanging, std::uint32_t blocks, std::uint32_t threads,
              void (*body)(const void* context), const void* context) {
  kernel_name = kernel;
  launched.push_back(blocks);
  Block block(threads, [&] { body(context); });
  std::vector<std::uint32_t> block_turns(std::min(blocks, last_blocks));
  std::vector<std::uint32_t> thread_turns(threads);
  arrange(block_turns, blocks - static_cast<std::uint32_t>(block_turns.size()));
  for (const std::uint32_t i : block_turns) {
    blockIdx.x = i;
    if (exchanging) {
      block.run();
      continue;
    }
    arrange(thread_turns);
    for (const std::uint32_t thread : thread_turns) {
      threadIdx.x = thread;
      body(context);
    }
  }
}

void barrier(const Site& site) { Block::of(site).barrier(site); }

std::uint64_t shuffle(std::uint64_t bits, std::uint32_t lane_mask, const Site& site) {
  return Block::of(site).shuffle(bits, lane_mask, site);
}

SharedArray& shared_array(const char* name, std::size_t size, const Site& site) {
  return Block::of(site).shared(name, size, site);
}

std::uint64_t read_shared(SharedArray& array, std::int64_t index, const Site& site) { return array.read(index, site); }

void write_shared(SharedArray& array, std::int64_t index, std::uint64_t bits, const Site& site) {
  array.write(index, bits, site);
}

} // namespace kl_ext::emulation
