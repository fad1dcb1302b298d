// Pooling of 8-bit codes in NHWC. Units of work are output rows, flat over batch * out_height.
// Strides are in bytes; a row's pixels lie side by side, `channels` bytes each. Borders that the
// strides leave around an image are neither read nor written.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Output pixel (i, j) is the maximum over rows [row_begin[i], row_end[i]) step row_step and columns
// likewise (already cut to the input; never empty).
struct MaxPool2dArgs {
  const uint8_t* x = nullptr;
  uint8_t* y = nullptr;
  bool is_signed = false;
  int64_t channels = 0;
  int64_t out_height = 0, out_width = 0;
  int64_t x_row_stride = 0, x_image_stride = 0;
  int64_t y_row_stride = 0, y_image_stride = 0;
  const int64_t* row_begin = nullptr;  // [out_height]
  const int64_t* row_end = nullptr;
  int64_t row_step = 1;
  const int64_t* column_begin = nullptr;  // [out_width]
  const int64_t* column_end = nullptr;
  int64_t column_step = 1;
};
void max_pool2d(const MaxPool2dArgs& args, int64_t begin, int64_t end);

// Output pixel (i, j) = clamp(rne(float(sum over the window of (x - x_zero_point)) * m) +
// zero_point, lo, hi) with m = float(multiplier / divisor), divisor = row_divisor[i] *
// column_divisor[j] (multiplier is double, s_x / s_y). Windows as in MaxPool2dArgs with step 1.
struct AvgPool2dArgs {
  const uint8_t* x = nullptr;
  uint8_t* y = nullptr;
  bool x_signed = false;
  int64_t channels = 0;
  int64_t out_height = 0, out_width = 0;
  int64_t x_row_stride = 0, x_image_stride = 0;
  int64_t y_row_stride = 0, y_image_stride = 0;
  const int64_t* row_begin = nullptr;
  const int64_t* row_end = nullptr;
  const int64_t* column_begin = nullptr;
  const int64_t* column_end = nullptr;
  const int64_t* row_divisor = nullptr;     // [out_height]
  const int64_t* column_divisor = nullptr;  // [out_width]
  double multiplier = 1.0;
  int32_t x_zero_point = 0, zero_point = 0, lo = 0, hi = 255;
};
void avg_pool2d(const AvgPool2dArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
