// Reads tensors of any strides and float type where they are: in the order of memory as far as
// their strides give one, in blocks that fit the first level cache.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/convert.h"

namespace qtoolkit::ops {

// The dimensions of a tensor as nested loops over its memory.
struct StridedLayout {
  struct Dimension {
    int64_t size, stride;  // in elements
    bool apart;
  };
  std::vector<Dimension> dimensions;  // outermost first, at least one
  int64_t repeats = 1;                // elements of the tensor that each address stands for

  int64_t count() const;  // addresses
};

// The layout with the least strides innermost and neighbours merged where they can be; expanded
// dimensions become `repeats`. Dimension `apart`, if not -1, stays a loop of its own, marked so.
StridedLayout layout_in_memory(const at::Tensor& x, int64_t apart = -1);

// Calls body(run, count, first) for runs of the innermost dimension, which are elements
// [first, first + count) of the layout; all together are [begin, end).
template <class T, class Body>
void visit_runs(const T* base, const StridedLayout& layout, int64_t begin, int64_t end,
                const Body& body) {
  const auto& dimensions = layout.dimensions;
  const size_t last = dimensions.size() - 1;
  std::vector<int64_t> index(dimensions.size());
  int64_t offset = 0, rest = begin;
  for (size_t d = dimensions.size(); d-- > 0;) {
    index[d] = rest % dimensions[d].size;
    rest /= dimensions[d].size;
    offset += index[d] * dimensions[d].stride;
  }
  while (begin < end) {
    const int64_t count = std::min(dimensions[last].size - index[last], end - begin);
    body(base + offset, count, begin);
    begin += count;
    index[last] += count;
    offset += count * dimensions[last].stride;
    for (size_t d = last; d > 0 && index[d] == dimensions[d].size; --d) {
      offset += dimensions[d - 1].stride - dimensions[d].size * dimensions[d].stride;
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Calls body(values, count, first) for elements [first, first + count) of the layout, float32 side
// by side; all together are [begin, end). A call has elements of one multiple of `unit` only; the
// innermost dimension divides `unit`, unless that is as long as it can be.
template <class Body>
void read_strided(const at::Tensor& x, const StridedLayout& layout, int64_t begin, int64_t end,
                  const Body& body, int64_t unit = std::numeric_limits<int64_t>::max()) {
  constexpr int64_t kBlock = 1024;
  constexpr int64_t kLongRun = 256;
  const int64_t stride = layout.dimensions.back().stride;
  const auto read = [&]<class T>(const T* base) {
    constexpr bool kFloats = std::is_same_v<T, float>;
    const bool bfloat16 = x.scalar_type() == at::kBFloat16;
    alignas(64) T block[kBlock];
    alignas(64) float floats[kFloats ? 1 : kBlock];
    int64_t filled = 0, first = begin;
    const auto hand_over = [&](const T* values, int64_t count, int64_t at) {
      if constexpr (kFloats) {
        body(values, count, at);
      } else {
        kernels::to_float({.bfloat16 = bfloat16, .half_in = values, .float_out = floats}, 0, count);
        body(static_cast<const float*>(floats), count, at);
      }
    };
    const auto flush = [&] {
      if (filled > 0) hand_over(block, filled, first);
      filled = 0;
    };
    visit_runs(base, layout, begin, end, [&](const T* run, int64_t count, int64_t at) {
      const bool whole_unit = filled == 0 && (at + count) % unit == 0;
      if (stride == 1 && (count >= kLongRun || whole_unit)) {
        flush();
        const int64_t most = kFloats ? count : kBlock;
        for (int64_t i = 0; i < count; i += most) {
          hand_over(run + i, std::min(most, count - i), at + i);
        }
        return;
      }
      for (int64_t i = 0; i < count;) {
        if (filled == 0) first = at + i;
        const int64_t part = std::min(count - i, kBlock - filled);
        for (int64_t k = 0; k < part; ++k) block[filled + k] = run[(i + k) * stride];
        filled += part;
        i += part;
        if (filled == kBlock || (at + i) % unit == 0) flush();
      }
    });
    flush();
  };
  if (x.scalar_type() == at::kFloat) {
    read(x.const_data_ptr<float>());
  } else {
    read(static_cast<const uint16_t*>(x.const_data_ptr()));
  }
}

}  // namespace qtoolkit::ops
