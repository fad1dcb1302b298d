// 16 codes at a time: the table fills half of the registers, and tbl looks up 64 entries at once,
// with 0 for an index past them; tbx then leaves what was there.
#include <arm_neon.h>

#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::neondot {
namespace {

constexpr int64_t kCodes = 16;

class Table {
 public:
  explicit Table(const uint8_t* table) {
    for (int k = 0; k < 4; ++k) entries_[k] = vld1q_u8_x4(table + 64 * k);
  }

  uint8x16_t operator()(uint8x16_t codes) const {
    const uint8x16_t quarter = vdupq_n_u8(64);
    uint8x16_t result = vqtbl4q_u8(entries_[0], codes);
#pragma GCC unroll 3
    for (int k = 1; k < 4; ++k) {
      codes = vsubq_u8(codes, quarter);
      result = vqtbx4q_u8(result, entries_[k], codes);
    }
    return result;
  }

 private:
  uint8x16x4_t entries_[4];
};

}  // namespace

void lookup(const LookupArgs& args, int64_t begin, int64_t end) {
  const Table table(args.table);
  const auto one_row = [&](const uint8_t* x, uint8_t* y, int64_t count) {
    int64_t c = 0;
    for (; c + kCodes <= count; c += kCodes) vst1q_u8(y + c, table(vld1q_u8(x + c)));
    for (; c < count; ++c) y[c] = args.table[x[c]];
  };
  if (args.x_row_stride == args.channels && args.y_row_stride == args.channels) {
    const int64_t offset = begin * args.channels;
    one_row(args.x + offset, args.y + offset, (end - begin) * args.channels);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    one_row(args.x + row * args.x_row_stride, args.y + row * args.y_row_stride, args.channels);
  }
}

}  // namespace qtoolkit::kernels::neondot
