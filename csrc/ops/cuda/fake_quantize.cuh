// Fake-quantize of dense memory with parameters that are read on the device.
#pragma once

#include "ops/checks.h"
#include "ops/cuda/map.cuh"

namespace qtoolkit::ops {

struct Channel {
  float scale, inverse, low, high;  // low and high relative to the zero point
};

// Scale and zero point of each channel, as given or as learned (Esser et al. 2020; Bhalgat et al.
// 2020): then the scale is the size of the learned number, but never next to 0, over `divisor`, and
// the zero point is the code nearest to the learned one.
struct Qparams {
  const float* scale = nullptr;
  const int32_t* zero_point = nullptr;        // or none: 0
  const float* learned_zero_point = nullptr;  // or none
  bool learned = false;
  float divisor = 1.0f;
  int32_t quant_min = 0, quant_max = 255;

  __device__ Channel at(int64_t c) const {
    float step = scale[c];
    if (learned) step = __fdiv_rn(fmaxf(fabsf(step), 0x1p-100f), divisor);
    const auto low = static_cast<float>(quant_min), high = static_cast<float>(quant_max);
    float zero = 0.0f;
    if (zero_point != nullptr) zero = __int2float_rn(zero_point[c]);
    if (learned_zero_point != nullptr) {
      zero = rintf(fminf(fmaxf(learned_zero_point[c], low), high));
    }
    return {step, __fdiv_rn(1.0f, step), __fsub_rn(low, zero), __fsub_rn(high, zero)};
  }
};

// y = dequantize(quantize(x)); the bit says where the gradient passes. See kernels/fake_quantize.h.
struct FakeQuantizeOp {
  using Param = Channel;
  static constexpr bool kTwo = false;

  Qparams qparams;
  bool relu = false;
  const float* min_val = nullptr;  // or none; where it is +Inf nothing is known, and y = x
  bool unknown = false;

  __device__ void start() { unknown = min_val != nullptr && *min_val == kInf; }
  __device__ Channel param(int64_t c) const { return qparams.at(c); }
  __device__ float operator()(float x, float /*other*/, const Channel& channel, bool& bit) const {
    const float gate = relu ? 0.0f : -kInf;
    const float input = x < gate ? 0.0f : x;
    const Rounded rounded = round_to_code(input, channel.inverse, channel.low, channel.high);
    bit = (rounded.in_range && x > gate) || unknown;
    const float y = __fmul_rn(rounded.code, channel.scale);
    // 0 * Inf where 1 / scale overflows is code 0; NaN stays as it is.
    const float special = isnan(input) ? input : 0.0f;
    return unknown ? input : isnan(rounded.value) ? special : y;
  }
};

// x and y are dense in the same order and of the same type; mask may be undefined.
void fake_quantize_into(const FakeQuantizeOp& op, const ParamView& view, const Tensor& x,
                        const Tensor& y, const Tensor& mask);

}  // namespace qtoolkit::ops
