#include "kernels/conv_transpose2d.h"

#include <algorithm>
#include <numeric>

namespace qtoolkit::kernels {

std::vector<TransposedAxis> transposed_axes(const TransposedGeometry& geometry, int64_t out_size) {
  const auto [kernel, stride, padding, dilation] = geometry;
  // Input position i and tap k make output i * stride - padding + k * dilation.
  const int64_t common = std::gcd(stride, dilation);
  std::vector<TransposedAxis> axes;
  for (int64_t first = 0; first < std::min(stride, out_size); ++first) {
    TransposedAxis axis{.first_output = first, .outputs = (out_size - first + stride - 1) / stride};
    for (int64_t tap = 0; tap < kernel; ++tap) {
      if ((first + padding - tap * dilation) % stride != 0) continue;
      axis.kernel = axis.taps.first < 0 ? 1 : axis.kernel + 1;
      axis.taps = {.first = tap, .step = stride / common};
      axis.dilation = dilation / common;
      axis.first_input = (first + padding - tap * dilation) / stride;
    }
    axes.push_back(axis);
  }
  return axes;
}

Border transposed_border(const std::vector<TransposedAxis>& axes, int64_t in_size) {
  Border border;
  for (const TransposedAxis& axis : axes) {
    border.before = std::max(border.before, -axis.first_input);
    border.after = std::max(border.after, axis.last_input() - (in_size - 1));
  }
  return border;
}

namespace {

// Calls element(i, at) for element i of a part's weight and its place in the transposed
// convolution's weight, -1 where no tap reaches the part's outputs.
template <class Element>
void each_weight(const Conv2dShape& part, const TransposedTaps& rows, const TransposedTaps& columns,
                 int64_t kernel_height, int64_t kernel_width, const Element& element) {
  const bool reached = rows.first >= 0 && columns.first >= 0;
  int64_t index = 0;
  for (int64_t group = 0; group < part.groups; ++group) {
    for (int64_t out = 0; out < part.out_channels; ++out) {
      for (int64_t in = 0; in < part.in_channels; ++in) {
        const int64_t channel = (group * part.in_channels + in) * part.out_channels + out;
        for (int64_t i = 0; i < part.kernel_height; ++i) {
          for (int64_t j = 0; j < part.kernel_width; ++j) {
            const int64_t row = rows.first - i * rows.step;
            const int64_t column = columns.first - j * columns.step;
            element(index++, reached ? (channel * kernel_height + row) * kernel_width + column
                                     : int64_t{-1});
          }
        }
      }
    }
  }
}

}  // namespace

void transposed_weight(const Conv2dShape& part, const TransposedTaps& rows,
                       const TransposedTaps& columns, int64_t kernel_height, int64_t kernel_width,
                       const int8_t* weight, int8_t* result) {
  each_weight(part, rows, columns, kernel_height, kernel_width,
              [&](int64_t i, int64_t at) { result[i] = at < 0 ? int8_t{0} : weight[at]; });
}

void untransposed_weight(const Conv2dShape& part, const TransposedTaps& rows,
                         const TransposedTaps& columns, int64_t kernel_height, int64_t kernel_width,
                         const int8_t* part_weight, int8_t* weight) {
  each_weight(part, rows, columns, kernel_height, kernel_width, [&](int64_t i, int64_t at) {
    if (at >= 0) weight[at] = part_weight[i];
  });
}

}  // namespace qtoolkit::kernels
