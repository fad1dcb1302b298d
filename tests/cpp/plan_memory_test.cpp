// A run of a plan allocates nothing once its size is known. Every allocation of this program is
// counted: operator new, and what arenas are made with.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "engine_programs.h"
#include "kernels/kernels.h"

namespace {

std::atomic<int64_t> allocations{0};

void* counted(size_t bytes, size_t alignment) {
  ++allocations;
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}
void* counted_or_throw(size_t bytes, size_t alignment) {
  void* const memory = counted(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return counted_or_throw(bytes, 16); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return counted_or_throw(bytes, static_cast<size_t>(alignment));
}
// Those too that do not throw: a sanitizer has its own, whose memory the deletes below cannot free.
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return counted(bytes, 16); }
void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return counted(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
extern "C" void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
  return counted(bytes, alignment);
}

namespace qtoolkit::engine {
namespace {

// A team that has got one thread only, whatever was asked for.
void run_alone(int64_t, const std::function<void(int64_t, int64_t)>& body) { body(0, 1); }

TEST(PlanMemory, ARunOfAKnownSizeAllocatesNothing) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const Team team = run_alone;
  for (const int64_t images : {1, 3}) {
    for (const int64_t threads : {1, 2}) {
      const std::vector<Outside> inputs = {{shape_of({images, 3, 33, 33}), Type::float32, true}};
      const std::vector<float> x = kernels::Random(7).reals(images * 3 * 33 * 33, -2.0f, 2.0f);
      std::vector<float> logits(static_cast<size_t>(images) * 10);
      std::vector<float> maps(static_cast<size_t>(images) * 24 * 9 * 9);
      const void* const data[] = {x.data()};
      void* const outputs[] = {logits.data(), maps.data()};
      const int64_t first = allocations;
      plan.run(inputs, data, outputs, threads, team);
      // A new size makes an arena, so what is counted can be seen.
      if (images == 1) {
        EXPECT_GT(allocations, first);
      }
      plan.run(inputs, data, outputs, threads, team);
      const int64_t before = allocations;
      for (int run = 0; run < 5; ++run) plan.run(inputs, data, outputs, threads, team);
      EXPECT_EQ(allocations, before) << images << " images, " << threads << " threads";
    }
  }
}

}  // namespace
}  // namespace qtoolkit::engine
