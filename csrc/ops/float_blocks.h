// Kernels compute in float32. Tensors of 16-bit floats are converted block by block, in the first
// level cache, so that no tensor's worth of memory is needed.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "kernels/convert.h"

namespace qtoolkit::ops {

inline constexpr int64_t kFloatBlock = 1024;

// Calls body(values, first, begin, end) for elements [begin, end) of x, a dense float32, float16 or
// bfloat16 tensor: `values` are float32 and start at element `first`.
template <class Body>
void read_floats(const at::Tensor& x, int64_t begin, int64_t end, const Body& body) {
  if (x.scalar_type() == at::kFloat) {
    body(x.const_data_ptr<float>(), int64_t{0}, begin, end);
    return;
  }
  alignas(64) float block[kFloatBlock];
  const auto* halves = static_cast<const uint16_t*>(x.const_data_ptr());
  const bool bfloat16 = x.scalar_type() == at::kBFloat16;
  for (; begin < end; begin += kFloatBlock) {
    const int64_t count = std::min(kFloatBlock, end - begin);
    kernels::to_float({.bfloat16 = bfloat16, .half_in = halves + begin, .float_out = block}, 0,
                      count);
    body(block, begin, begin, begin + count);
  }
}

// The same with results: body(values, results, first, begin, end) writes elements [begin, end) of
// y, which has the type and layout of x. values and results may be the same memory.
template <class Body>
void map_floats(const at::Tensor& x, const at::Tensor& y, int64_t begin, int64_t end,
                const Body& body) {
  if (x.scalar_type() == at::kFloat) {
    body(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), int64_t{0}, begin, end);
    return;
  }
  alignas(64) float block[kFloatBlock];
  const auto* halves = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* results = static_cast<uint16_t*>(y.mutable_data_ptr());
  const bool bfloat16 = x.scalar_type() == at::kBFloat16;
  for (; begin < end; begin += kFloatBlock) {
    const int64_t count = std::min(kFloatBlock, end - begin);
    kernels::to_float({.bfloat16 = bfloat16, .half_in = halves + begin, .float_out = block}, 0,
                      count);
    body(block, block, begin, begin, begin + count);
    kernels::from_float({.bfloat16 = bfloat16, .float_in = block, .half_out = results + begin}, 0,
                        count);
  }
}

}  // namespace qtoolkit::ops
