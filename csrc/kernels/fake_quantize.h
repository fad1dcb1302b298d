// Fake-quantize: quantize, then dequantize, float32 values, and the straight-through gradient. See
// core/rounding.h for the arithmetic.
//
// Memory is contiguous. begin and end are flat element indices.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Element i has the parameters number
//   (i / inner * ceil(inner / group) + i % inner / group) % channels,
// which covers all granularities:
//   per tensor: channels = 1;
//   per channel of memory seen as [outer, channels, inner]: group = inner;
//   per group along rows of `inner` elements: channels = the number of all groups.
struct FakeQuantizeArgs {
  int64_t channels = 1, inner = 1, group = 1;
  const float* scale = nullptr;         // [channels], > 0 and finite
  const int32_t* zero_point = nullptr;  // [channels], in [quant_min, quant_max]
  int32_t quant_min = 0, quant_max = 255;
  bool relu = false;  // a ReLU comes before
  int64_t first = 0;  // x and y start at element `first`, a multiple of 8
  const float* x = nullptr;
  float* y = nullptr;       // may be x
  uint8_t* mask = nullptr;  // or none; starts at element 0
};

// y = dequantize(quantize(x)); NaN stays NaN, +-Inf is clamped.
// Bit i % 8 of byte i / 8 of mask says whether the gradient of element i passes: where
// quant_min <= rne(x / scale) + zero_point <= quant_max (and x > 0 with a ReLU); not where x is NaN
// or infinite. With a mask, begin is a multiple of 8 and the bits of the last byte beyond `end` are
// 0.
void fake_quantize(const FakeQuantizeArgs& args, int64_t begin, int64_t end);

// y = grad where the mask's bit is 1, else +0, of elements of 2 or 4 bytes of any type.
struct MaskGradientArgs {
  int64_t element_bytes = 4;
  const void* grad = nullptr;
  const uint8_t* mask = nullptr;
  void* y = nullptr;  // may be grad
};
// begin is a multiple of 8.
void mask_gradient(const MaskGradientArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
