#include "kernels/scratch.h"

#include <memory>
#include <new>

namespace qtoolkit::kernels {
namespace {

constexpr std::align_val_t kLine{64};
struct Delete {
  void operator()(uint8_t* memory) const { ::operator delete(memory, kLine); }
};

}  // namespace

uint8_t* thread_scratch(int64_t bytes) {
  thread_local std::unique_ptr<uint8_t, Delete> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    memory.reset(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), kLine)));
    size = bytes;
  }
  return memory.get();
}

}  // namespace qtoolkit::kernels
