// What the scalar convolution paths do with a finished accumulator. Static: several files of
// different instruction sets include it.
#pragma once

#include "core/rounding.h"
#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// Writes one output: `pixel` counts output pixels row by row, `channel` goes over all groups.
static inline void store_conv2d_output(const Conv2dArgs& args, int64_t pixel, int64_t channel,
                                       int32_t acc, float multiplier) {
  const int64_t index = pixel * args.y_pixel_stride + channel;
  float value = static_cast<float>(acc) * multiplier;
  if (args.output == Conv2dOutput::float32) {
    if (args.relu && value < 0.0f) value = 0.0f;
    static_cast<float*>(args.y)[index] = value;
    return;
  }
  if (args.residual != nullptr) {
    const int64_t from = pixel * args.residual_pixel_stride + channel;
    const int32_t code = args.residual_signed
                             ? int32_t{static_cast<const int8_t*>(args.residual)[from]}
                             : int32_t{static_cast<const uint8_t*>(args.residual)[from]};
    value += static_cast<float>(code - args.residual_zero_point) * args.residual_multiplier;
  }
  // int8 and uint8 codes have the same low byte.
  static_cast<uint8_t*>(args.y)[index] =
      static_cast<uint8_t>(round_to_code(value, args.zero_point, args.lo, args.hi));
}

// The same for `channels` consecutive channels.
static inline void store_conv2d_outputs(const Conv2dArgs& args, int64_t pixel, int64_t channel,
                                        int64_t channels, const int32_t* acc,
                                        const float* multiplier) {
  for (int64_t i = 0; i < channels; ++i) {
    store_conv2d_output(args, pixel, channel + i, acc[i], multiplier[i]);
  }
}

}  // namespace qtoolkit::kernels
