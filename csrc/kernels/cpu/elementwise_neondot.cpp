// Requantization, 16 codes at a time.
#include <cstdint>

#include "kernels/cpu/codes_neon.h"
#include "kernels/elementwise.h"

namespace qtoolkit::kernels::neondot {
namespace {

// One for all channels, or those of four channels from c on.
template <bool kApart>
inline float32x4_t factors(const float* values, int64_t c) {
  return kApart ? vld1q_f32(values + c) : vld1q_dup_f32(values);
}

template <bool kApart, bool kAddend>
inline uint8x16_t requantize_codes(uint8x16_t x, const CodesIn& in, const CodesOut& out,
                                   const float* multiplier, const float* addend, int64_t c) {
  float32x4_t values[4];
  in(x, values);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    values[k] = vmulq_f32(values[k], factors<kApart>(multiplier, c + 4 * k));
    if (kAddend) values[k] = vaddq_f32(values[k], factors<kApart>(addend, c + 4 * k));
  }
  return out(values);
}

template <bool kApart, bool kAddend>
void requantize_row(const RequantizeArgs& args, const uint8_t* x, uint8_t* y, int64_t count) {
  const CodesIn in(args.x_signed, args.x_zero_point);
  const CodesOut out(args.zero_point, args.lo, args.hi);
  const float* multiplier = args.multiplier;
  const float* addend = args.addend;
  int64_t c = 0;
  for (; c + kCodes <= count; c += kCodes) {
    const uint8x16_t codes =
        requantize_codes<kApart, kAddend>(vld1q_u8(x + c), in, out, multiplier, addend, c);
    vst1q_u8(y + c, codes);
  }
  const int64_t left = count - c;
  if (left == 0) return;
  float multipliers[kCodes] = {}, addends[kCodes] = {};
  const size_t bytes = static_cast<size_t>(kApart ? left : 1) * sizeof(float);
  __builtin_memcpy(multipliers, multiplier + (kApart ? c : 0), bytes);
  if (kAddend) __builtin_memcpy(addends, addend + (kApart ? c : 0), bytes);
  store_codes(
      y + c, left,
      requantize_codes<kApart, kAddend>(load_codes(x + c, left), in, out, multipliers, addends, 0));
}

using RequantizeRow = void(const RequantizeArgs&, const uint8_t*, uint8_t*, int64_t);
RequantizeRow* requantize_row_for(const RequantizeArgs& args) {
  if (args.channels_apart) {
    return args.addend != nullptr ? requantize_row<true, true> : requantize_row<true, false>;
  }
  return args.addend != nullptr ? requantize_row<false, true> : requantize_row<false, false>;
}

}  // namespace

void requantize(const RequantizeArgs& args, int64_t begin, int64_t end) {
  RequantizeRow* const one_row = requantize_row_for(args);
  const bool gapless = args.x_row_stride == args.channels && args.y_row_stride == args.channels;
  if (gapless && !args.channels_apart) {  // one long row
    const int64_t offset = begin * args.channels;
    one_row(args, args.x + offset, args.y + offset, (end - begin) * args.channels);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    one_row(args, args.x + row * args.x_row_stride, args.y + row * args.y_row_stride,
            args.channels);
  }
}

}  // namespace qtoolkit::kernels::neondot
