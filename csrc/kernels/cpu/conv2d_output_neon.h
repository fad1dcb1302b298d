// What Arm's convolution paths do with finished sums of sixteen channels. Everything is internal:
// files of an instruction-set path include it.
#pragma once

#include "kernels/conv2d_output.h"
#include "kernels/cpu/codes_neon.h"

namespace qtoolkit::kernels::neondot {
namespace {

constexpr int kLanes = 4;  // int32 in a register

// Four taps' bytes beside each other: register i has those of channels 4 * i to 4 * i + 3.
inline void interleave(const uint8x16_t (&taps)[4], int8x16_t (&quads)[4]) {
  const uint16x8_t first[2] = {vreinterpretq_u16_u8(vzip1q_u8(taps[0], taps[1])),
                               vreinterpretq_u16_u8(vzip2q_u8(taps[0], taps[1]))};
  const uint16x8_t second[2] = {vreinterpretq_u16_u8(vzip1q_u8(taps[2], taps[3])),
                                vreinterpretq_u16_u8(vzip2q_u8(taps[2], taps[3]))};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    quads[2 * i] = vreinterpretq_s8_u16(vzip1q_u16(first[i], second[i]));
    quads[2 * i + 1] = vreinterpretq_s8_u16(vzip2q_u16(first[i], second[i]));
  }
}

// Sixteen channels' sums to codes.
class SumsToCodes {
 public:
  explicit SumsToCodes(const Conv2dArgs& args)
      : out_(args.zero_point, args.lo, args.hi),
        residual_(args.residual_signed, args.residual_zero_point),
        residual_multiplier_(vdupq_n_f32(args.residual_multiplier)) {}

  template <bool kResidual>
  uint8x16_t codes(const int32x4_t (&sums)[4], const float32x4_t (&multiplier)[4],
                   uint8x16_t residual) const {
    float32x4_t values[4], addends[4];
    if (kResidual) residual_(residual, addends);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      values[i] = vmulq_f32(vcvtq_f32_s32(sums[i]), multiplier[i]);
      // A product and a sum, each rounded.
      if (kResidual) values[i] = vaddq_f32(values[i], vmulq_f32(addends[i], residual_multiplier_));
    }
    return out_(values);
  }

 private:
  CodesOut out_;
  CodesIn residual_;
  float32x4_t residual_multiplier_;
};

}  // namespace
}  // namespace qtoolkit::kernels::neondot
