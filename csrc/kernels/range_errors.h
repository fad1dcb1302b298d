// Squared errors of quantizing, for many candidates of the range or the scale. Sums have the same
// bits on every path: term i is added to s[i % 8] in the order of i, in double, and the 8 sums
// become one by halves: s[k] += s[k + 4], then 2 and 1.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// A histogram whose values lie evenly in their bins, for the range from bin first[c] to last[c] cut
// into `levels` cells of equal width: values become the centre of their cell, beyond the range that
// of the outermost cell. With cell = (last - first + 1) / levels, in units of the bin's width and
// in double,
//   g(edge)   = k * (2 * (cell / 2)^3) + d * d * d, k = trunc(clamp(edge / cell, 0, levels - 1)),
//               d = edge - (k + 0.5) * cell
//   errors[c] = sum of mass[i] * (g(i + 1 - first) - g(i - first)) over the bins, divided by 3.
// begin and end count candidates.
struct CellErrorsArgs {
  const double* mass = nullptr;  // [bins]
  int64_t bins = 0;
  const int32_t* first = nullptr;  // [candidates]
  const int32_t* last = nullptr;   // [candidates]
  int32_t levels = 0;
  double* errors = nullptr;  // [candidates]
};
void cell_errors(const CellErrorsArgs& args, int64_t begin, int64_t end);

// errors[c] = sum of mass[i] * double(x[i] - y)^2, y being x[i] fake-quantized in float32 with
// scale[c] and zero_point[c]; mass is 1 where it is absent. begin and end count candidates.
struct ScaleErrorsArgs {
  const float* x = nullptr;      // [size], finite
  const double* mass = nullptr;  // [size] or absent
  int64_t size = 0;
  const float* scale = nullptr;         // [candidates]
  const int32_t* zero_point = nullptr;  // [candidates]
  int32_t quant_min = 0, quant_max = 255;
  double* errors = nullptr;  // [candidates]
};
void scale_errors(const ScaleErrorsArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
