#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::portable {

void lookup(const LookupArgs& args, int64_t begin, int64_t end) {
  const uint8_t* table = args.table;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = args.x + row * args.x_row_stride;
    uint8_t* y = args.y + row * args.y_row_stride;
    int64_t c = 0;
    // Four codes are read before the first is written: the compiler cannot know that y is not
    // table.
    for (; c + 4 <= args.channels; c += 4) {
      const uint8_t first = table[x[c]], second = table[x[c + 1]];
      const uint8_t third = table[x[c + 2]], fourth = table[x[c + 3]];
      y[c] = first;
      y[c + 1] = second;
      y[c + 2] = third;
      y[c + 3] = fourth;
    }
    for (; c < args.channels; ++c) y[c] = table[x[c]];
  }
}

}  // namespace qtoolkit::kernels::portable
