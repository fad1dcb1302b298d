#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::portable {
namespace {

void lookup_row(const uint8_t* table, const uint8_t* x, uint8_t* y, int64_t count) {
  int64_t c = 0;
  // Four are read before one is written: the compiler cannot know that y is not the table.
  for (; c + 4 <= count; c += 4) {
    const uint8_t first = table[x[c]], second = table[x[c + 1]];
    const uint8_t third = table[x[c + 2]], fourth = table[x[c + 3]];
    y[c] = first;
    y[c + 1] = second;
    y[c + 2] = third;
    y[c + 3] = fourth;
  }
  for (; c < count; ++c) y[c] = table[x[c]];
}

}  // namespace

void lookup(const LookupArgs& args, int64_t begin, int64_t end) {
  if (args.x_row_stride == args.channels && args.y_row_stride == args.channels) {
    const int64_t offset = begin * args.channels;
    lookup_row(args.table, args.x + offset, args.y + offset, (end - begin) * args.channels);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    lookup_row(args.table, args.x + row * args.x_row_stride, args.y + row * args.y_row_stride,
               args.channels);
  }
}

}  // namespace qtoolkit::kernels::portable
