// From the least and greatest value of a tensor to its scale and zero point: the rule of
// python/qtoolkit/observers/base.py and moving_average.py, bit for bit, in float32 with one
// rounding per operation.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace qtoolkit {

// The range that an observer has recorded; nothing yet at +Inf and -Inf.
struct ValueRange {
  float min = std::numeric_limits<float>::infinity();
  float max = -std::numeric_limits<float>::infinity();

  bool finite() const { return std::isfinite(min) && std::isfinite(max); }
  bool seen() const { return min != std::numeric_limits<float>::infinity(); }
};

// The exponential moving average of the ranges of batches; the first batch sets it. A batch that is
// not finite changes nothing, nor does one so far away that the average would not be.
inline ValueRange moving_average(ValueRange running, ValueRange batch, float averaging_constant) {
  if (!batch.finite()) return running;
  if (!running.seen()) return batch;
  const ValueRange average = {running.min + averaging_constant * (batch.min - running.min),
                              running.max + averaging_constant * (batch.max - running.max)};
  return average.finite() ? average : running;
}

struct ScaleAndZeroPoint {
  float scale = 1.0f;
  int32_t zero_point = 0;
};

// Affine: the range is widened to include 0. Symmetric: the zero point is 0 for signed codes, else
// the middle code. A range of zero gives float32's epsilon as scale.
inline ScaleAndZeroPoint range_to_qparams(ValueRange range, bool symmetric, int32_t quant_min,
                                          int32_t quant_max) {
  // Its inverse, and products with other scales, are finite.
  static constexpr float kSmallest = 0x1p-100f;
  const auto valid = [](float scale) {
    return scale == 0.0f ? FLT_EPSILON : std::clamp(scale, kSmallest, FLT_MAX);
  };
  const float low = std::min(range.min, 0.0f), high = std::max(range.max, 0.0f);
  const float steps = static_cast<float>(quant_max - quant_min);
  if (symmetric) {
    return {valid(std::max(-low, high) / (steps / 2.0f)),
            quant_min < 0 ? 0 : (quant_min + quant_max + 1) / 2};
  }
  const float scale = valid((high - low) / steps);
  const float zero_point = static_cast<float>(quant_min) - std::nearbyintf(low / scale);
  return {scale, static_cast<int32_t>(std::clamp(zero_point, static_cast<float>(quant_min),
                                                 static_cast<float>(quant_max)))};
}

}  // namespace qtoolkit
