// Extremes of tensors, and the range that an observer keeps on the device.
#pragma once

#include <cfloat>

#include "ops/checks.h"
#include "ops/cuda/reduce.cuh"

namespace qtoolkit::ops {

// Minimum and maximum; NaN if anything taken was NaN. -0 counts as +0.
struct Extremes {
  float minimum, maximum;

  static __device__ Extremes none() { return {kInf, -kInf}; }
  __device__ void take(float x) { merge({__fadd_rn(x, 0.0f), __fadd_rn(x, 0.0f)}); }
  __device__ void merge(const Extremes& other) {
    const bool nan = isnan(other.minimum) || isnan(minimum);
    const float quiet_nan = __int_as_float(0x7fc00000);
    minimum = nan ? quiet_nan : fminf(minimum, other.minimum);
    maximum = nan ? quiet_nan : fmaxf(maximum, other.maximum);
  }
};

struct ExtremesOp {
  using Sums = Extremes;
  struct Param {};
  static constexpr bool kTwo = false, kOut = false;

  __device__ void start() {}
  __device__ Param param(int64_t /*c*/) const { return {}; }
  __device__ void take(float x, float /*other*/, bool /*bit*/, const Param& /*param*/,
                       Extremes& sums, float& /*out*/) const {
    sums.take(x);
  }
};

// The state of a moving-average observer, one element each, and its rule: core/value_range.h on the
// device, bit for bit.
struct RangeState {
  float* min_val = nullptr;
  float* max_val = nullptr;
  float* scale = nullptr;
  int32_t* zero_point = nullptr;
  float averaging_constant = 0.0f;
  bool symmetric = false;
  int32_t quant_min = 0, quant_max = 255;

  __device__ void observe(const Extremes& batch) const {
    float minimum = *min_val, maximum = *max_val;
    if (isfinite(batch.minimum) && isfinite(batch.maximum)) {
      const bool first = minimum == kInf;
      const float low = first ? batch.minimum : average(minimum, batch.minimum);
      const float high = first ? batch.maximum : average(maximum, batch.maximum);
      if (isfinite(low) && isfinite(high)) {
        minimum = low;
        maximum = high;
      }
    }
    if (minimum == kInf) return;  // still nothing known
    *min_val = minimum;
    *max_val = maximum;
    const float low = fminf(minimum, 0.0f), high = fmaxf(maximum, 0.0f);
    const auto steps = static_cast<float>(quant_max - quant_min);
    if (symmetric) {
      *scale = valid(__fdiv_rn(fmaxf(-low, high), steps / 2.0f));
      *zero_point = quant_min < 0 ? 0 : (quant_min + quant_max + 1) / 2;
      return;
    }
    const float step = valid(__fdiv_rn(__fsub_rn(high, low), steps));
    const float zero = __fsub_rn(static_cast<float>(quant_min), rintf(__fdiv_rn(low, step)));
    *scale = step;
    *zero_point = static_cast<int32_t>(
        fminf(fmaxf(zero, static_cast<float>(quant_min)), static_cast<float>(quant_max)));
  }

 private:
  __device__ float average(float running, float batch) const {
    return __fadd_rn(running, __fmul_rn(averaging_constant, __fsub_rn(batch, running)));
  }
  static __device__ float valid(float scale) {
    return scale == 0.0f ? FLT_EPSILON : fminf(fmaxf(scale, 0x1p-100f), FLT_MAX);
  }
};

// The Finish that takes the extremes of a tensor as those of the next batch.
struct Observe {
  RangeState state;
  __device__ void operator()(int64_t /*channel*/, const Extremes& batch) const {
    state.observe(batch);
  }
};

// Takes the extremes of x, dense and not empty, as those of the next batch.
void observe_range(const Tensor& x, const RangeState& state);

}  // namespace qtoolkit::ops
