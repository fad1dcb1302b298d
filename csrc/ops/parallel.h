// How much work is worth a thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace qtoolkit::ops {

// Waking the team costs some microseconds; these many elements or multiplications cost more.
inline constexpr int64_t kElementGrain = 1 << 15;
inline constexpr int64_t kMultiplyGrain = 1 << 21;

// Units of work for one thread at least, where one unit costs `cost` and `grain` is worth a thread.
inline int64_t grain_of(int64_t grain, int64_t cost) {
  return std::max<int64_t>(1, grain / std::max<int64_t>(1, cost));
}

// Calls body(begin, end) for parts of [0, count) whose bits of a mask share no cache line.
template <class Body>
void parallel_for_mask(int64_t count, const Body& body) {
  constexpr int64_t kLine = 512;
  at::parallel_for(
      0, (count + kLine - 1) / kLine, kElementGrain / kLine,
      [&](int64_t begin, int64_t end) { body(begin * kLine, std::min(end * kLine, count)); });
}

}  // namespace qtoolkit::ops
