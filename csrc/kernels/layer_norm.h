// Layer norm of rows of 8-bit codes. Units of work are rows.
#pragma once

#include <cmath>
#include <cstdint>

namespace qtoolkit::kernels {

// Of a row, n = length, c[i] = x[i] - x_zero_point, all sums exact:
//   mean     = sum(c) / n, variance = (n * sum(c * c) - sum(c)^2) / n^2          (double)
//   factor   = x_scale / sqrt(variance * x_scale * x_scale + eps)                (double)
//   a, b     = float(factor), float((rne(mean) - mean) * factor)
//   value[i] = (float(c[i] - rne(mean)) * a + b) * weight[i] + bias[i]            (float32)
//   y[i]     = clamp(rne(value[i]) + zero_point, lo, hi), or value[i] where y_float is set.
// The caller has divided weight and bias by the output's scale.
struct LayerNormArgs {
  const uint8_t* x = nullptr;
  bool is_signed = false;
  uint8_t* y = nullptr;
  float* y_float = nullptr;
  int64_t length = 0;                          // of a row, in [1, 2^23]
  int64_t x_row_stride = 0, y_row_stride = 0;  // elements
  const float* weight = nullptr;               // [length]
  const float* bias = nullptr;                 // [length]
  double x_scale = 1.0, eps = 0.0;
  int32_t x_zero_point = 0, zero_point = 0, lo = 0, hi = 255;
};
void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end);

struct LayerNormRow {
  int32_t middle;  // the code at rne(mean)
  float a, b;
};
// From the exact sums of a row's centred codes and of their squares.
static inline LayerNormRow layer_norm_row(const LayerNormArgs& args, int64_t sum, int64_t squares) {
  const auto count = static_cast<double>(args.length);
  const double mean = static_cast<double>(sum) / count;
  const auto spread = static_cast<double>(args.length * squares - sum * sum);
  const double variance = spread / (count * count);
  const double factor = args.x_scale / std::sqrt(variance * args.x_scale * args.x_scale + args.eps);
  const double middle = std::nearbyint(mean);
  return {args.x_zero_point + static_cast<int32_t>(middle), static_cast<float>(factor),
          static_cast<float>((middle - mean) * factor)};
}

}  // namespace qtoolkit::kernels
