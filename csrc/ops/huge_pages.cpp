#include "ops/huge_pages.h"

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qtoolkit::ops {
void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A last page that would be used for less than a half stays in small ones. Failure is no error:
  // small pages do as well.
  madvise(memory, (bytes + kHugePageBytes / 2) / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

namespace {

uintptr_t next_huge_page(const void* memory) {
  return (reinterpret_cast<uintptr_t>(memory) + kHugePageBytes - 1) / kHugePageBytes *
         kHugePageBytes;
}

// Whether it is the first call for this memory, as far as is remembered.
bool first_call_for(const void* memory, size_t bytes) {
  constexpr size_t kRemembered = 4096;
  static std::mutex mutex;
  static auto* const seen = new std::unordered_map<const void*, size_t>;
  const std::lock_guard lock(mutex);
  const auto known = seen->find(memory);
  if (known != seen->end() && known->second == bytes) return false;
  if (seen->size() >= kRemembered) seen->clear();
  (*seen)[memory] = bytes;
  return true;
}

}  // namespace

void move_to_huge_pages(const void* memory, size_t bytes) {
  if (bytes < kHugeTensorBytes || !first_call_for(memory, bytes)) return;
#if defined(__linux__)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
  const uintptr_t begin = next_huge_page(memory);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePageBytes * kHugePageBytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

namespace {

// The block comes from PyTorch's CPU allocator, which is asked for two pages more: their
// memory is not touched, so they cost address space only. Its context holds that block, so that
// errors, statistics and the profiler's records are PyTorch's own.
class HugePageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::Allocator* const system = c10::GetCPUAllocator();
    if (bytes < kHugeTensorBytes) return system->allocate(bytes);
    auto* const block = new c10::DataPtr(system->allocate(bytes + 2 * kHugePageBytes));
    void* const memory = reinterpret_cast<void*>(next_huge_page(block->get()));
    advise_huge_pages(memory, bytes);
    return {memory, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

 private:
  static void release(void* block) { delete static_cast<c10::DataPtr*>(block); }
};

}  // namespace

c10::Allocator* huge_page_allocator() {
  // Never destroyed: tensors may outlive static objects.
  static auto* const allocator = new HugePageAllocator;
  return allocator;
}

}  // namespace qtoolkit::ops
