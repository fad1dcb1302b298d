// Rows of float32 to uint8 codes, each row with the scale and zero point of its own range.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// The range of a row is [min(0, its least), max(0, its greatest)], from which scale and zero point
// follow as in core/value_range.h (affine, [0, 255]); codes as in core/rounding.h. A row that holds
// NaN or infinity gets the scale NaN, zero point 0 and codes 0. begin and end count rows.
struct QuantizeRowsArgs {
  const float* x = nullptr;
  int64_t width = 0;
  int64_t x_row_stride = 0;  // elements
  uint8_t* codes = nullptr;
  int64_t codes_row_stride = 0;
  float* scale = nullptr;         // [rows]
  int32_t* zero_point = nullptr;  // [rows]
};
void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
