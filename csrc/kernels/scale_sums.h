// The end of a product of matrices of codes: from int32 sums to float32 or to codes.
#pragma once

#include <cstdint>

#include "core/activation.h"

namespace qtoolkit::kernels {

// For row r and column c, with `acc` wrapping as the sums do:
//   acc = sums + row_factor[r] * column_term[c] + row_term[r]
//   y   = activation(float(acc) * (row_scale[r] * column_scale[c]) + bias[c])       float32
// or, with codes, y = clamp(rne(that) + zero_point, lo, hi), NaN becoming the zero point.
// begin and end count rows.
struct ScaleSumsArgs {
  const int32_t* sums = nullptr;
  int64_t sums_row_stride = 0;  // elements
  int64_t columns = 0;
  const int32_t* row_factor = nullptr;   // [rows]
  const int32_t* row_term = nullptr;     // [rows]; nothing is added if absent
  const float* row_scale = nullptr;      // [rows]
  const int32_t* column_term = nullptr;  // [columns]
  const float* column_scale = nullptr;   // [columns]
  const float* bias = nullptr;           // [columns]; nothing is added if absent
  Activation activation = Activation::none;

  int64_t y_row_stride = 0;  // elements, of y or y_codes
  float* y = nullptr;
  uint8_t* y_codes = nullptr;  // instead of y, int8 codes if lo < 0
  int32_t zero_point = 0, lo = 0, hi = 255;
};
void scale_sums(const ScaleSumsArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
