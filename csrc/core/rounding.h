// The rounding rule, once, for every scalar path. All arithmetic is float32 with one rounding per
// operation; the build forbids contraction into fused multiply-adds (-ffp-contract=off).
//
// The functions are static: files compiled for different instruction sets include this header, and
// a function with external linkage compiled for AVX-512 could be the copy that the linker keeps.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace qtoolkit {

// Round half to even, in the default floating-point environment.
QT_HOST_DEVICE static inline float round_half_even(float x) { return std::nearbyintf(x); }

// clamp(rne(x) + zero_point, lo, hi). Clamping before rounding is the same (rounding is monotone
// and the bounds are integers) and keeps the conversion to int32 in range. NaN gives the zero
// point.
QT_HOST_DEVICE static inline int32_t round_to_code(float x, int32_t zero_point, int32_t lo,
                                                   int32_t hi) {
  if (std::isnan(x)) x = 0.0f;
  const float low = static_cast<float>(lo - zero_point);
  const float high = static_cast<float>(hi - zero_point);
  x = x < low ? low : x;
  x = x > high ? high : x;
  return static_cast<int32_t>(round_half_even(x)) + zero_point;
}

// q = clamp(rne(x * inv_scale) + zero_point, quant_min, quant_max), inv_scale = 1.0f / scale.
QT_HOST_DEVICE static inline int32_t quantize_value(float x, float inv_scale, int32_t zero_point,
                                                    int32_t quant_min, int32_t quant_max) {
  return round_to_code(x * inv_scale, zero_point, quant_min, quant_max);
}

QT_HOST_DEVICE static inline float dequantize_value(int32_t q, float scale, int32_t zero_point) {
  return static_cast<float>(q - zero_point) * scale;
}

}  // namespace qtoolkit
