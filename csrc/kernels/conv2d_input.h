// Where the convolution paths find an output pixel's input. Static: several files of different
// instruction sets include it.
#pragma once

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// The first tap of an output pixel, counted over all images, at channel 0 of group 0.
static inline const uint8_t* conv2d_input(const Conv2dArgs& args, int64_t pixel) {
  const Conv2dShape& s = args.shape;
  const int64_t row = pixel / s.out_width;
  return args.x + row / s.out_height * args.x_image_stride +
         row % s.out_height * s.stride_height * args.x_row_stride +
         pixel % s.out_width * s.stride_width * args.x_pixel_stride;
}

}  // namespace qtoolkit::kernels
