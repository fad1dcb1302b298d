// Softmax of rows of 8-bit codes. Units of work are rows.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// exp(-s * d) of the difference d of two codes is a product of two of these 32 numbers, each
// rounded to float32, and so is the product.
struct SoftmaxTable {
  float high[16];  // exp(-s * 16 * i), 0 if less than 1e-15
  float low[16];   // exp(-s * i), likewise

  float at(int32_t difference) const { return high[difference >> 4] * low[difference & 15]; }
};

// `scale` is positive and finite.
SoftmaxTable softmax_table(float scale);

// Of a row, with d[i] = max - x[i] and e[i] = table.at(d[i]):
//   y[i] = clamp(rne(e[i] * (1.0f / (sum * y_scale))) + zero_point, lo, hi)
// or, where y_float is set, e[i] * (1.0f / sum). The sum is kept in 16 parts, e[i] being added to
// part i % 16, of which in the end the upper half is added to the lower one until one is left.
struct SoftmaxArgs {
  const uint8_t* x = nullptr;
  bool is_signed = false;
  uint8_t* y = nullptr;
  float* y_float = nullptr;
  int64_t length = 0;                          // of a row, at least 1
  int64_t x_row_stride = 0, y_row_stride = 0;  // elements
  SoftmaxTable table = {};
  float y_scale = 1.0f;
  int32_t zero_point = 0, lo = 0, hi = 255;
};
void softmax(const SoftmaxArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
