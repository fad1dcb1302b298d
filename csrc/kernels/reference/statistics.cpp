#include "kernels/statistics.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace qtoolkit::kernels::reference {

void min_max(const MinMaxArgs& args, int64_t begin, int64_t end) {
  const bool one_row = args.outer * args.channels == 1;
  const int64_t row_length = one_row ? 1 : args.inner;
  for (int64_t i = begin * row_length; i < end * row_length; ++i) {
    const int64_t c = one_row ? 0 : i / args.inner % args.channels;
    float& minimum = args.minimum[c];
    float& maximum = args.maximum[c];
    const float x = args.x[i] + 0.0f;  // -0 becomes +0
    if (std::isnan(x)) {
      minimum = maximum = std::numeric_limits<float>::quiet_NaN();
    } else {
      if (x < minimum) minimum = x;
      if (x > maximum) maximum = x;
    }
  }
}

void histogram(const HistogramArgs& args, int64_t begin, int64_t end) {
  const double width = static_cast<double>(args.upper) - static_cast<double>(args.lower);
  const double bins_per_unit = static_cast<double>(args.bins) / width;
  const float factor = static_cast<float>(
      std::min(bins_per_unit, static_cast<double>(std::numeric_limits<float>::max())));
  for (int64_t i = begin; i < end; ++i) {
    const float x = args.x[i];
    if (args.minimum != nullptr) {
      min_max({.x = &x, .inner = 1, .minimum = args.minimum, .maximum = args.maximum}, 0, 1);
    }
    if (!(x >= args.lower && x <= args.upper)) continue;
    const float position = (x - args.lower) * factor;
    const float last = static_cast<float>(args.bins - 1);
    args.counts[static_cast<int64_t>(std::min(position, last))] += 1;
  }
}

}  // namespace qtoolkit::kernels::reference
