// Batch norm in training (Ioffe & Szegedy 2015, algorithm 1) with what follows it: a residual, ReLU
// and fake-quantize; and its gradient.
//
// Memory is contiguous float32 seen as [outer, channels, inner]. Sums are in double: a product of
// two floats is exact there, so multiply-add instructions give the same bits. All else is float32
// with one rounding per operation. NaN results are NaN on every path, with any payload.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Elements that one step covers: element ranges begin at multiples of it, rows of channels are
// fastest where their number is one.
inline constexpr int64_t kBatchNormStep = 16;

// Sums and extremes of each channel in parts, which the caller adds up in their order. With inner >
// 1 a part is one row of `inner` elements, numbered over outer * channels, and its result one
// number; the element at place i of the row is added to sum i % kBatchNormStep, and these sums are
// added in their order. With inner = 1 a part is part_rows consecutive rows of `channels` elements
// (the last part has the rest), whose results are one number for each channel, added row by row.
// begin and end count parts; results are at [part] or at [part, channel]. The extremes ignore NaN
// (+Inf, -Inf if there is nothing else), and -0 counts as +0.
struct BatchNormStatisticsArgs {
  const float* x = nullptr;
  int64_t outer = 1, channels = 1, inner = 1;
  int64_t part_rows = 1;
  double* sum = nullptr;      // of x
  double* squares = nullptr;  // of x * x
  float* minimum = nullptr;
  float* maximum = nullptr;
};
void batch_norm_statistics(const BatchNormStatisticsArgs& args, int64_t begin, int64_t end);

// One number for each channel. With inner = 1 the arrays are [period + kBatchNormStep], element i
// belonging to channel i % channels; period is a multiple of channels and at least kBatchNormStep.
// Else they are [channels].
struct BatchNormArgs {
  int64_t outer = 1, channels = 1, inner = 1;
  int64_t period = 0;
  const float* factor = nullptr;
  const float* addend = nullptr;
  const float* x = nullptr;
  const float* residual = nullptr;   // may be absent
  float lower = 0.0f, upper = 0.0f;  // of the activation; -Inf and +Inf without one
  // batch_norm_act only
  bool quantized = false;
  float scale = 1.0f;
  int32_t zero_point = 0, quant_min = 0, quant_max = 255;
  float* y = nullptr;
  uint8_t* mask = nullptr;  // [ceil(elements / 8)]; may be absent
  // batch_norm_range only: merged into, as in MinMaxArgs
  float* minimum = nullptr;
  float* maximum = nullptr;
};
// z = x * factor + addend + residual, a = clamp(z, lower, upper), y = fake_quantize(a), or a.
// Bit i % 8 of mask[i / 8] is set where the gradient passes: lower < z < upper, and the code of a
// lies in the range of codes before it is clamped. begin and end count elements; begin, and end but
// for the last element of all, are multiples of kBatchNormStep.
void batch_norm_act(const BatchNormArgs& args, int64_t begin, int64_t end);
// Minimum and maximum of a.
void batch_norm_range(const BatchNormArgs& args, int64_t begin, int64_t end);

// With dz = gradient where the mask's bit is set (or there is no mask), else 0:
// batch_norm_reduce: sum[...] of dz and products[...] of dz * x, in parts as in
// BatchNormStatisticsArgs, and dz if the pointer is there (it may be grad).
struct BatchNormReduceArgs {
  int64_t outer = 1, channels = 1, inner = 1;
  int64_t part_rows = 1;
  const float* grad = nullptr;
  const float* x = nullptr;
  const uint8_t* mask = nullptr;  // may be absent
  float* dz = nullptr;            // may be absent
  double* sum = nullptr;
  double* products = nullptr;
};
void batch_norm_reduce(const BatchNormReduceArgs& args, int64_t begin, int64_t end);

// grad_x = (dz * factor + (x - mean) * slope) + addend, or dz * factor if x is absent. Arrays and
// begin and end as in BatchNormArgs. grad_x may be grad.
struct BatchNormGradientArgs {
  int64_t outer = 1, channels = 1, inner = 1;
  int64_t period = 0;
  const float* factor = nullptr;
  const float* mean = nullptr;
  const float* slope = nullptr;
  const float* addend = nullptr;
  const float* grad = nullptr;
  const float* x = nullptr;
  const uint8_t* mask = nullptr;  // may be absent
  float* grad_x = nullptr;
};
void batch_norm_gradient(const BatchNormGradientArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
