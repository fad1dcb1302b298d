// Memory for the kernels: it starts at a cache line, where vector loads are fastest.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace qtoolkit::ops {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <class Byte>
using AlignedBuffer = std::unique_ptr<Byte, FreeDeleter>;

// `bytes` bytes, not initialized; throws torch.OutOfMemoryError.
template <class Byte>
AlignedBuffer<Byte> aligned_buffer(int64_t bytes) {
  static_assert(sizeof(Byte) == 1);
  constexpr int64_t kAlignment = 64;
  // aligned_alloc wants a multiple of the alignment.
  const int64_t size = std::max((bytes + kAlignment - 1) / kAlignment * kAlignment, kAlignment);
  void* const memory = std::aligned_alloc(kAlignment, static_cast<size_t>(size));
  TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr, "qtoolkit: could not allocate ", size,
                   " bytes");
  return AlignedBuffer<Byte>(static_cast<Byte*>(memory));
}

}  // namespace qtoolkit::ops
