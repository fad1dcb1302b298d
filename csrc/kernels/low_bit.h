// Fake-quantize to few values: ternary, binary, small floats, and blocks of small floats under a
// scale of their own. float32 in and out; NaN stays NaN.
//
// Memory is contiguous; begin and end are flat element indices, where nothing else is said.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// What the per-tensor and per-channel kernels share. Element i has channel i / inner % channels.
struct LowBitArgs {
  int64_t channels = 1, inner = 1;
  const float* scale = nullptr;  // [channels], finite
  int64_t first = 0;             // x and y start at element `first`, a multiple of 8
  const float* x = nullptr;
  float* y = nullptr;       // may be x
  uint8_t* mask = nullptr;  // where the gradient passes, or none: see kernels/fake_quantize.h
};

// y = |x| > threshold ? copysign(scale, x) : 0. Without a mask: the gradient passes everywhere.
struct TernaryArgs {
  LowBitArgs common = {};
  const float* threshold = nullptr;  // [channels], >= 0
};
void fake_quantize_ternary(const TernaryArgs& args, int64_t begin, int64_t end);

// y = x >= 0 ? scale : -scale; the mask is |x| <= clip.
struct BinaryArgs {
  LowBitArgs common = {};
  float clip = 1.0f;
};
void fake_quantize_binary(const BinaryArgs& args, int64_t begin, int64_t end);

// The numbers +-k * 2^e with e >= min_exponent - mantissa_bits and k < 2^(mantissa_bits + 1), up to
// max_value, which is one of them.
struct FloatFormat {
  int32_t mantissa_bits = 0;  // in [1, 22]
  int32_t min_exponent = 0;   // in [-126, 64]
  float max_value = 0.0f;
};

// y = scale times the format's number nearest to x * (1.0f / scale), half to the even k; beyond
// max_value that or its negative. The mask is |x * (1.0f / scale)| <= max_value.
struct FloatArgs {
  LowBitArgs common = {};  // scale > 0
  FloatFormat format;
};
void fake_quantize_float(const FloatArgs& args, int64_t begin, int64_t end);

// Blocks of `block` elements of a row of `length` elements, the last one may be short; begin and
// end count blocks. y is as for fake_quantize_float (0 for a scale of 0), with the block's scale,
// where amax is its largest |x| that is not NaN, FLT_MAX at most:
//   2^(floor(log2 amax) - floor(log2 max_value)), the exponent clamped to [-127, 127];
//   or, for a tensor_scale that is not 0, tensor_scale times the fp8_e4m3 number nearest to
//   amax / max_value / tensor_scale.
struct BlockFloatArgs {
  FloatFormat format;  // max_value >= 1
  int64_t length = 0, block = 32;
  float tensor_scale = 0.0f;
  const float* x = nullptr;
  float* y = nullptr;  // may be x
};
void fake_quantize_block_float(const BlockFloatArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
