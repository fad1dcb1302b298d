// Images of float32 to images of codes in NHWC, and back: the first and the last step of a network.
// One scale and zero point; see core/rounding.h for the arithmetic. Units of work are rows, flat
// over batch * height.
//
// The strides of floats are in elements and free, so that they are NCHW or NHWC or cut out of
// either. A pixel's codes lie side by side; their strides are in bytes, and what they leave between
// pixels, rows and images is neither read nor written.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

struct QuantizeImageArgs {
  const float* x = nullptr;
  uint8_t* y = nullptr;
  int64_t height = 0, width = 0, channels = 0;
  int64_t x_image_stride = 0, x_channel_stride = 0, x_row_stride = 0, x_column_stride = 0;
  int64_t y_image_stride = 0, y_row_stride = 0, y_pixel_stride = 0;
  float scale = 1.0f;  // > 0 and finite
  int32_t zero_point = 0, quant_min = 0, quant_max = 255;
};
// y = clamp(rne(x * (1.0f / scale)) + zero_point); NaN becomes the zero point.
void quantize_image(const QuantizeImageArgs& args, int64_t begin, int64_t end);

struct DequantizeImageArgs {
  const uint8_t* x = nullptr;
  float* y = nullptr;
  bool is_signed = false;
  int64_t height = 0, width = 0, channels = 0;
  int64_t x_image_stride = 0, x_row_stride = 0, x_pixel_stride = 0;
  int64_t y_image_stride = 0, y_channel_stride = 0, y_row_stride = 0, y_column_stride = 0;
  float scale = 1.0f;
  int32_t zero_point = 0;
};
// y = float(x - zero_point) * scale
void dequantize_image(const DequantizeImageArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
