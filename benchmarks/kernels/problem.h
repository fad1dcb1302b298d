// One layer's arguments and the memory they point to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/conv2d.h"
#include "layers.h"

namespace qtoolkit::benchmarks {

// Memory in huge pages where the system has them: 24 MB of weights in small pages cost a tenth of
// ResNet-18's time in address translation.
void* allocate_pages(size_t bytes);
void free_pages(void* memory);

template <class T>
struct PageAllocator {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(allocate_pages(n * sizeof(T))); }
  void deallocate(T* p, size_t) { free_pages(p); }
  bool operator==(const PageAllocator&) const = default;
};
template <class T>
using Buffer = std::vector<T, PageAllocator<T>>;

class Problem {
 public:
  // Input and output have borders. With `cold_weights` each call reads another copy of the weights,
  // of so many that they have left the core's own caches when they are read again, as those of a
  // whole network have.
  Problem(const Layer& layer, bool cold_weights);
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  void call();

 private:
  // Normal values, the largest of each channel at 127: the AVX2 path's work depends on the weights.
  void fill_weight(int64_t channels, int64_t reduction);

  static constexpr int64_t kColdBytes = int64_t{24} << 20;

  bool depthwise_;
  kernels::Conv2dArgs args_;
  int64_t copies_, copy_bytes_, next_ = 0;
  Buffer<uint8_t> x_, y_, residual_;
  Buffer<int8_t> weight_, packed_;
  Buffer<int32_t> offset_;
  Buffer<float> multiplier_;
};

}  // namespace qtoolkit::benchmarks
