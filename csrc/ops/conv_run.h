// Runs a convolution kernel over a batch: borders, signed codes and threads.
#pragma once

#include <cstdint>

#include "kernels/conv2d.h"

namespace qtoolkit::ops {

// The input: NHWC codes, contiguous, or if `planar` NCHW.
struct ConvImages {
  const uint8_t* x = nullptr;
  bool planar = false;
  bool is_signed = false;  // the kernel sees code ^ 0x80, that is code + 128
  int64_t batch = 1, height = 1, width = 1, channels = 1;
  int64_t padding_height = 0, padding_width = 0;
  uint8_t border = 0;  // the unsigned code of zero
};

// `args` is complete but for x, its strides, and the row and image strides of y and of the
// residual, which have no gaps; it describes the first image.
void run_conv2d(const kernels::Conv2dArgs& args, const ConvImages& images, bool depthwise);

}  // namespace qtoolkit::ops
