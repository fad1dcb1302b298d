#include "ops/huge_pages.h"

#include <c10/core/CPUAllocator.h>

#include <cstdint>
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

// The block comes from PyTorch's CPU allocator, which is asked for two pages more: their
// memory is not touched, so they cost address space only. Its context holds that block, so that
// errors, statistics and the profiler's records are PyTorch's own.
class HugePageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    c10::Allocator* const system = c10::GetCPUAllocator();
    if (bytes < kHugeTensorBytes) return system->allocate(bytes);
    auto* const block = new c10::DataPtr(system->allocate(bytes + 2 * kHugePageBytes));
    const auto address = reinterpret_cast<uintptr_t>(block->get());
    const uintptr_t aligned = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    void* const memory = reinterpret_cast<void*>(aligned);
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
