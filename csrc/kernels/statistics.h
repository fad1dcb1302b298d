// Statistics of float32 tensors for observers.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Minimum and maximum per channel of contiguous memory seen as [outer, channels, inner] (per
// tensor: outer = channels = 1). begin and end count rows of `inner` elements, flat over outer *
// channels; per tensor, where there is one row, they count elements. Results are merged into
// minimum and maximum, which the caller starts at +Inf and -Inf. A NaN anywhere makes both results
// of its channel the positive quiet NaN. -0 counts as +0, so that the bits do not depend on the
// order.
struct MinMaxArgs {
  const float* x = nullptr;
  int64_t outer = 1, channels = 1, inner = 0;
  float* minimum = nullptr;  // [channels]
  float* maximum = nullptr;  // [channels]
};
void min_max(const MinMaxArgs& args, int64_t begin, int64_t end);

// Adds x[begin, end) to a histogram of `bins` equal bins over [lower, upper]. The bin is
// int(float(x - lower) * float(bins / (upper - lower))), the last bin includes upper; values
// outside and NaN are not counted. lower < upper, both finite, bins in [1, 2^24]. bins / (upper -
// lower) is computed in double and capped at FLT_MAX. minimum and maximum, where they are given,
// take the extremes of all values as those of one channel of min_max.
struct HistogramArgs {
  const float* x = nullptr;
  float lower = 0.0f, upper = 0.0f;
  int64_t bins = 0;
  int64_t* counts = nullptr;  // [bins], added to
  float* minimum = nullptr;   // [1], with maximum or absent
  float* maximum = nullptr;   // [1]
};
void histogram(const HistogramArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
