#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::reference {

void lookup(const LookupArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = args.x + row * args.x_row_stride;
    uint8_t* y = args.y + row * args.y_row_stride;
    for (int64_t c = 0; c < args.channels; ++c) y[c] = args.table[x[c]];
  }
}

}  // namespace qtoolkit::kernels::reference
