#include "kernels/batch_norm.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

int64_t channel_of(int64_t channels, int64_t inner, int64_t i) { return i / inner % channels; }

// Calls take(result, lane, element) for the elements of a part in their order; a lane is one of the
// sums that make up the result.
template <class Args, class Take>
void for_part(const Args& args, int64_t part, Take take) {
  if (args.inner > 1) {
    for (int64_t i = 0; i < args.inner; ++i) {
      take(part, i % kBatchNormStep, part * args.inner + i);
    }
    return;
  }
  for (int64_t row = part * args.part_rows; row < (part + 1) * args.part_rows && row < args.outer;
       ++row) {
    for (int64_t c = 0; c < args.channels; ++c) {
      take(part * args.channels + c, 0, row * args.channels + c);
    }
  }
}

template <class Args>
int64_t results_of_part(const Args& args) {
  return args.inner > 1 ? 1 : args.channels;
}

// results[...] = the sum over a part of value(element).
template <class Args, class Value>
void sum_part(const Args& args, int64_t part, double* results, Value value) {
  const int64_t first = part * results_of_part(args);
  for (int64_t r = first; r < first + results_of_part(args); ++r) {
    double lanes[kBatchNormStep] = {};
    for_part(args, part, [&](int64_t result, int64_t lane, int64_t i) {
      if (result == r) lanes[lane] += value(i);
    });
    results[r] = lanes[0];
    const int64_t used = args.inner > 1 ? kBatchNormStep : 1;
    for (int64_t lane = 1; lane < used; ++lane) results[r] += lanes[lane];
  }
}

bool bit_of(const uint8_t* mask, int64_t i) {
  return mask == nullptr || (mask[i / 8] >> i % 8 & 1);
}

// The activation's input.
float normalized(const BatchNormArgs& args, int64_t i) {
  const int64_t c = channel_of(args.channels, args.inner, i);
  float z = args.x[i] * args.factor[c];
  z = z + args.addend[c];
  if (args.residual != nullptr) z = z + args.residual[i];
  return z;
}

float activated(const BatchNormArgs& args, float z) {
  z = z < args.lower ? args.lower : z;
  return z > args.upper ? args.upper : z;
}

}  // namespace

void batch_norm_statistics(const BatchNormStatisticsArgs& args, int64_t begin, int64_t end) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int64_t part = begin; part < end; ++part) {
    sum_part(args, part, args.sum, [&](int64_t i) { return double{args.x[i]}; });
    sum_part(args, part, args.squares, [&](int64_t i) { return double{args.x[i]} * args.x[i]; });
    const int64_t first = part * results_of_part(args);
    for (int64_t r = first; r < first + results_of_part(args); ++r) {
      args.minimum[r] = kInf;
      args.maximum[r] = -kInf;
    }
    for_part(args, part, [&](int64_t result, int64_t, int64_t i) {
      const float x = args.x[i] + 0.0f;  // -0 becomes +0
      if (x < args.minimum[result]) args.minimum[result] = x;
      if (x > args.maximum[result]) args.maximum[result] = x;
    });
  }
}

void batch_norm_act(const BatchNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float z = normalized(args, i);
    const float a = activated(args, z);
    bool passes = z > args.lower && z < args.upper;
    args.y[i] = a;
    if (args.quantized && !std::isnan(a)) {
      const float inverse = 1.0f / args.scale;
      const float rounded = round_half_even(a * inverse);
      passes = passes && rounded >= static_cast<float>(args.quant_min - args.zero_point) &&
               rounded <= static_cast<float>(args.quant_max - args.zero_point);
      const int32_t code =
          quantize_value(a, inverse, args.zero_point, args.quant_min, args.quant_max);
      args.y[i] = dequantize_value(code, args.scale, args.zero_point);
    }
    if (args.mask != nullptr) {
      uint8_t& byte = args.mask[i / 8];
      if (i % 8 == 0) byte = 0;
      byte = static_cast<uint8_t>(byte | (passes ? 1 << i % 8 : 0));
    }
  }
}

void batch_norm_range(const BatchNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float a = activated(args, normalized(args, i)) + 0.0f;  // -0 becomes +0
    if (std::isnan(a)) {
      *args.minimum = *args.maximum = std::numeric_limits<float>::quiet_NaN();
    } else {
      if (a < *args.minimum) *args.minimum = a;
      if (a > *args.maximum) *args.maximum = a;
    }
  }
}

void batch_norm_reduce(const BatchNormReduceArgs& args, int64_t begin, int64_t end) {
  const auto dz = [&](int64_t i) { return bit_of(args.mask, i) ? args.grad[i] : 0.0f; };
  for (int64_t part = begin; part < end; ++part) {
    sum_part(args, part, args.sum, [&](int64_t i) { return double{dz(i)}; });
    sum_part(args, part, args.products, [&](int64_t i) { return double{dz(i)} * args.x[i]; });
    if (args.dz == nullptr) continue;
    for_part(args, part, [&](int64_t, int64_t, int64_t i) { args.dz[i] = dz(i); });
  }
}

void batch_norm_gradient(const BatchNormGradientArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = channel_of(args.channels, args.inner, i);
    const float dz = bit_of(args.mask, i) ? args.grad[i] : 0.0f;
    const float scaled = dz * args.factor[c];
    if (args.x == nullptr) {
      args.grad_x[i] = scaled;
      continue;
    }
    const float through_statistics = (args.x[i] - args.mean[c]) * args.slope[c];
    const float sum = scaled + through_statistics;
    args.grad_x[i] = sum + args.addend[c];
  }
}

}  // namespace qtoolkit::kernels::reference
