// What the scalar convolution paths do with a finished accumulator. Static: several files of
// different instruction sets include it.
#pragma once

#include "core/rounding.h"
#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// Where an output pixel lies, in elements from the first one of y and of the residual.
struct Conv2dPlace {
  int64_t y, residual;
};

static inline Conv2dPlace conv2d_place(const Conv2dArgs& args, int64_t image, int64_t row,
                                       int64_t column) {
  return {image * args.y_image_stride + row * args.y_row_stride + column * args.y_pixel_stride,
          image * args.residual_image_stride + row * args.residual_row_stride +
              column * args.residual_pixel_stride};
}
// The same for a pixel counted row by row over all images.
static inline Conv2dPlace conv2d_place(const Conv2dArgs& args, int64_t pixel) {
  const Conv2dShape& s = args.shape;
  const int64_t row = pixel / s.out_width;
  return conv2d_place(args, row / s.out_height, row % s.out_height, pixel % s.out_width);
}

// Writes one output; `channel` goes over all groups.
static inline void store_conv2d_output(const Conv2dArgs& args, Conv2dPlace place, int64_t channel,
                                       int32_t acc, float multiplier) {
  const int64_t index = place.y + channel;
  if (args.output == Conv2dOutput::int32) {
    static_cast<int32_t*>(args.y)[index] = acc;
    return;
  }
  float value = static_cast<float>(acc) * multiplier;
  if (args.output == Conv2dOutput::float32) {
    if (args.relu && value < 0.0f) value = 0.0f;
    static_cast<float*>(args.y)[index] = value;
    return;
  }
  if (args.residual != nullptr) {
    const int64_t from = place.residual + channel;
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
static inline void store_conv2d_outputs(const Conv2dArgs& args, Conv2dPlace place, int64_t channel,
                                        int64_t channels, const int32_t* acc,
                                        const float* multiplier) {
  for (int64_t i = 0; i < channels; ++i) {
    store_conv2d_output(args, place, channel + i, acc[i], multiplier[i]);
  }
}

}  // namespace qtoolkit::kernels
