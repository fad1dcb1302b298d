// Quantize and dequantize float32 values, per tensor or per channel. See core/rounding.h for the
// arithmetic.
//
// Memory is contiguous and seen as [outer, channels, inner]; per tensor is channels = 1 and
// outer = 1. begin and end are flat element indices.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

struct QuantizeArgs {
  int64_t channels = 1, inner = 1;
  const float* scale = nullptr;         // [channels], > 0 and finite
  const int32_t* zero_point = nullptr;  // [channels]
  int32_t quant_min = 0, quant_max = 255;
  const float* x = nullptr;
  const uint8_t* codes = nullptr;  // dequantize's input; int8 codes if quant_min < 0
  uint8_t* y_codes = nullptr;      // quantize's output
  float* y = nullptr;              // dequantize's output
};

// y_codes = clamp(rne(x * (1.0f / scale)) + zero_point); NaN becomes the zero point.
void quantize(const QuantizeArgs& args, int64_t begin, int64_t end);
// y = float(code - zero_point) * scale
void dequantize(const QuantizeArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
