// conv2d for the shapes that winograd_fits(), with quads of weights.
#pragma once

#include "kernels/conv2d.h"

namespace qtoolkit::kernels::avx2 {

void winograd_conv2d(const Conv2dArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels::avx2
