// conv2d for weights that are packed as quads, where steps would take too long to make: products of
// two activations, or weights that were packed for another path.
#pragma once

#include "kernels/conv2d.h"

namespace qtoolkit::kernels::avx2 {

void quads_conv2d(const Conv2dArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels::avx2
