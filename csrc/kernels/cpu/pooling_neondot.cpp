// Average pooling, 16 channels at a time. Maxima take the portable loops, which are written with
// vectors of 16 codes.
#include "kernels/cpu/codes_neon.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::neondot {
namespace {

// So many codes of 255 fit in 16 bits.
constexpr int64_t kMostTaps = 257;

// Adds the codes at x, x + step, ... before x + end, in 16 bits as far as they fit.
void add_taps(const uint8_t* x, int64_t end, int64_t step, uint8x16_t flip, uint32x4_t (&sum)[4]) {
  for (int64_t at = 0; at < end;) {
    const int64_t taps = (end - at + step - 1) / step;
    const int64_t part_end = taps > kMostTaps ? at + kMostTaps * step : end;
    uint16x8_t low = vdupq_n_u16(0), high = vdupq_n_u16(0);
    for (; at < part_end; at += step) {
      const uint8x16_t codes = veorq_u8(vld1q_u8(x + at), flip);
      low = vaddw_u8(low, vget_low_u8(codes));
      high = vaddw_high_u8(high, codes);
    }
    sum[0] = vaddw_u16(sum[0], vget_low_u16(low));
    sum[1] = vaddw_high_u16(sum[1], low);
    sum[2] = vaddw_u16(sum[2], vget_low_u16(high));
    sum[3] = vaddw_high_u16(sum[3], high);
  }
}

}  // namespace

// args is a copy, which a store of bytes cannot change.
void avg_pool2d(const AvgPool2dArgs& shared, int64_t begin, int64_t end) {
  if (shared.channels < kCodes) return portable::avg_pool2d(shared, begin, end);
  const AvgPool2dArgs args = shared;
  const CodesOut out(args.zero_point, args.lo, args.hi);
  const int32_t flip = args.x_signed ? 128 : 0;
  const uint8x16_t flips = vdupq_n_u8(static_cast<uint8_t>(flip));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const int64_t rows = args.row_end[i] - args.row_begin[i];
    uint8_t* y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    for (int64_t j = 0; j < args.out_width; ++j, y += args.channels) {
      const int64_t columns = args.column_end[j] - args.column_begin[j];
      const uint8_t* const x = args.x + n * args.x_image_stride +
                               args.row_begin[i] * args.x_row_stride +
                               args.column_begin[j] * args.channels;
      const int64_t divisor = args.row_divisor[i] * args.column_divisor[j];
      const float multiplier = static_cast<float>(args.multiplier / static_cast<double>(divisor));
      const uint32x4_t start = vdupq_n_u32(static_cast<uint32_t>(
          -(args.x_zero_point + flip) * static_cast<int32_t>(rows * columns)));
      // The last block overlaps the one before it.
      for (int64_t next = 0; next < args.channels; next += kCodes) {
        const int64_t c = next + kCodes <= args.channels ? next : args.channels - kCodes;
        uint32x4_t sum[4] = {start, start, start, start};
        for (int64_t r = 0; r < rows; ++r) {
          add_taps(x + r * args.x_row_stride + c, columns * args.channels, args.channels, flips,
                   sum);
        }
        float32x4_t values[4];
        for (int k = 0; k < 4; ++k) {
          values[k] = vmulq_n_f32(vcvtq_f32_s32(vreinterpretq_s32_u32(sum[k])), multiplier);
        }
        vst1q_u8(y + c, out(values));
      }
    }
  }
}

}  // namespace qtoolkit::kernels::neondot
