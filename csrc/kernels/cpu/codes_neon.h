// Sixteen codes at a time with Arm's vectors: to four parts of four floats and back. Everything is
// internal: files of an instruction-set path include it.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace qtoolkit::kernels::neondot {
namespace {

constexpr int64_t kCodes = 16;

inline uint8x16_t load_codes(const uint8_t* x, int64_t count) {
  uint8_t codes[kCodes] = {};
  __builtin_memcpy(codes, x, static_cast<size_t>(count));
  return vld1q_u8(codes);
}
inline void store_codes(uint8_t* y, int64_t count, uint8x16_t codes) {
  uint8_t all[kCodes];
  vst1q_u8(all, codes);
  __builtin_memcpy(y, all, static_cast<size_t>(count));
}

// float(code - zero_point). An int8 code is read as code + 128, which flips its highest bit.
class CodesIn {
 public:
  CodesIn(bool is_signed, int32_t zero_point)
      : flip_(vdupq_n_u8(is_signed ? 128 : 0)),
        zero_point_(vdupq_n_s16(static_cast<int16_t>(zero_point + (is_signed ? 128 : 0)))) {}

  void operator()(uint8x16_t codes, float32x4_t (&parts)[4]) const {
    codes = veorq_u8(codes, flip_);
    const int16x8_t low =
        vsubq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes))), zero_point_);
    const int16x8_t high = vsubq_s16(vreinterpretq_s16_u16(vmovl_high_u8(codes)), zero_point_);
    parts[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    parts[1] = vcvtq_f32_s32(vmovl_high_s16(low));
    parts[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    parts[3] = vcvtq_f32_s32(vmovl_high_s16(high));
  }

 private:
  uint8x16_t flip_;
  int16x8_t zero_point_;
};

// round_to_code of core/rounding.h. The conversion rounds half to even, gives 0 for NaN and the
// nearest int32 for what is too large; narrowing and adding saturate likewise, so that no value
// passes a bound from outside, and the bounds are for the finished codes.
class CodesOut {
 public:
  CodesOut(int32_t zero_point, int32_t lo, int32_t hi) {
    const int32_t flip = lo < 0 ? 128 : 0;
    zero_point_ = vdupq_n_s16(static_cast<int16_t>(zero_point + flip));
    low_ = vdupq_n_u8(static_cast<uint8_t>(lo + flip));
    high_ = vdupq_n_u8(static_cast<uint8_t>(hi + flip));
    flip_ = vdupq_n_u8(static_cast<uint8_t>(flip));
  }

  uint8x16_t operator()(const float32x4_t (&parts)[4]) const {
    const uint8x8_t low = vqmovun_s16(words(parts[0], parts[1]));
    const uint8x16_t codes = vqmovun_high_s16(low, words(parts[2], parts[3]));
    return veorq_u8(vminq_u8(vmaxq_u8(codes, low_), high_), flip_);
  }

 private:
  int16x8_t words(float32x4_t a, float32x4_t b) const {
    const int16x4_t low = vqmovn_s32(vcvtnq_s32_f32(a));
    return vqaddq_s16(vqmovn_high_s32(low, vcvtnq_s32_f32(b)), zero_point_);
  }

  int16x8_t zero_point_;
  uint8x16_t low_, high_, flip_;
};

inline void quantize_codes(const float* x, int64_t count, float inverse, const CodesOut out,
                           uint8_t* y) {
  const auto codes = [&](const float* from) {
    float32x4_t parts[4];
    for (int k = 0; k < 4; ++k) parts[k] = vmulq_n_f32(vld1q_f32(from + 4 * k), inverse);
    return out(parts);
  };
  int64_t i = 0;
  for (; i + kCodes <= count; i += kCodes) vst1q_u8(y + i, codes(x + i));
  if (const int64_t left = count - i; left > 0) {
    float values[kCodes] = {};
    __builtin_memcpy(values, x + i, static_cast<size_t>(left) * sizeof(float));
    store_codes(y + i, left, codes(values));
  }
}

inline void dequantize_codes(const uint8_t* x, int64_t count, float scale, const CodesIn in,
                             float* y) {
  const auto values = [&](uint8x16_t codes, float* to) {
    float32x4_t parts[4];
    in(codes, parts);
    for (int k = 0; k < 4; ++k) vst1q_f32(to + 4 * k, vmulq_n_f32(parts[k], scale));
  };
  int64_t i = 0;
  for (; i + kCodes <= count; i += kCodes) values(vld1q_u8(x + i), y + i);
  if (const int64_t left = count - i; left > 0) {
    float last[kCodes];
    values(load_codes(x + i, left), last);
    __builtin_memcpy(y + i, last, static_cast<size_t>(left) * sizeof(float));
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::neondot
