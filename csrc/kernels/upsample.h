// Bilinear interpolation of 8-bit codes in NHWC. Units of work are output rows, flat over
// batch * out_height.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Between which two positions of an axis an output position lies, and what each counts.
struct LinearSource {
  int64_t first = 0, second = 0;
  float first_weight = 1.0f, second_weight = 0.0f;
};

// Output pixel (i, j), with r = rows[i] and c = columns[j]:
//   left  = float(x[r.first][c.first] - x_zero_point) * r.first_weight
//         + float(x[r.second][c.first] - x_zero_point) * r.second_weight
//   right = the same in column c.second
//   y     = clamp(rne(left * c.first_weight + right * c.second_weight) + zero_point, lo, hi)
// The factor between the scales of x and y is in the weights of the columns.
struct UpsampleBilinear2dArgs {
  const uint8_t* x = nullptr;
  uint8_t* y = nullptr;
  bool x_signed = false;
  // Bytes; a row's pixels lie side by side.
  int64_t x_image_stride = 0, x_row_stride = 0;
  int64_t y_image_stride = 0, y_row_stride = 0;
  int64_t channels = 0;
  int64_t out_height = 0, out_width = 0;
  const LinearSource* rows = nullptr;     // [out_height]
  const LinearSource* columns = nullptr;  // [out_width]
  int32_t x_zero_point = 0, zero_point = 0, lo = 0, hi = 255;
};
void upsample_bilinear2d(const UpsampleBilinear2dArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
