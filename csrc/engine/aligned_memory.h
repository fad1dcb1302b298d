// Memory for arenas and packed constants.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qtoolkit::engine {

struct Free {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using AlignedMemory = std::unique_ptr<uint8_t, Free>;

// `bytes` bytes, not initialized, at a multiple of 64 and, from 1 MB on, of a huge page, which is
// asked for: weights are read from end to end, where small pages cost a miss of the TLB each.
inline AlignedMemory aligned_memory(int64_t bytes) {
  constexpr size_t kHuge = size_t{2} << 20;
  const bool huge = bytes >= (int64_t{1} << 20);
  const size_t alignment = huge ? kHuge : 64;
  const size_t size = (static_cast<size_t>(bytes) + alignment) / alignment * alignment;
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(alignment, size));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (huge) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return AlignedMemory(memory);
}

}  // namespace qtoolkit::engine
