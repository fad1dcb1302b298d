// A transposed convolution as convolutions of stride 1: those output positions that are a multiple
// of the stride apart are made of the same taps, so for every such set there is one convolution,
// which writes its outputs a stride apart.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// Positions in the kernel of a convolution's taps, the tap at the lowest input position first: each
// further one is `step` before the last. `first` is -1 where no tap reaches the outputs.
struct TransposedTaps {
  int64_t first = -1, step = 1;
  bool operator==(const TransposedTaps&) const = default;
};

// What the outputs at positions first_output + i * stride, i < outputs, are along one axis: a
// convolution of stride 1 whose first tap is at input position first_input (before the input's
// begin if negative).
struct TransposedAxis {
  int64_t first_output = 0, outputs = 0;
  TransposedTaps taps = {};
  int64_t kernel = 1, dilation = 1;  // of the convolution
  int64_t first_input = 0;

  int64_t last_input() const { return first_input + outputs - 1 + (kernel - 1) * dilation; }
};

struct TransposedGeometry {
  int64_t kernel = 1, stride = 1, padding = 0, dilation = 1;
};
// One entry for each set of outputs, at most `stride`. out_size is not 0.
std::vector<TransposedAxis> transposed_axes(const TransposedGeometry& geometry, int64_t out_size);

// Input positions that the convolutions of an axis read before its begin and after its end.
struct Border {
  int64_t before = 0, after = 0;
};
Border transposed_border(const std::vector<TransposedAxis>& axes, int64_t in_size);

// The canonical weight of one of the convolutions, whose shape `part` is, from that of the
// transposed convolution, [groups * in_channels, out_channels, kernel_height, kernel_width].
void transposed_weight(const Conv2dShape& part, const TransposedTaps& rows,
                       const TransposedTaps& columns, int64_t kernel_height, int64_t kernel_width,
                       const int8_t* weight, int8_t* result);
// The way back: writes the elements of `weight` that the convolution's weight `part_weight` has.
void untransposed_weight(const Conv2dShape& part, const TransposedTaps& rows,
                         const TransposedTaps& columns, int64_t kernel_height, int64_t kernel_width,
                         const int8_t* part_weight, int8_t* weight);

}  // namespace qtoolkit::kernels
