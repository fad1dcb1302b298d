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

}  // namespace qtoolkit::ops
