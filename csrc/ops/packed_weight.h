// What the convolution kernels read instead of a weight, its scale and its bias.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "kernels/conv2d.h"
#include "kernels/conv2d_terms.h"
#include "kernels/conv_transpose2d.h"
#include "ops/aligned_buffer.h"
#include "ops/checks.h"

namespace qtoolkit::ops {

// The taps of a transposed convolution's weight that make one of its convolutions.
struct TransposedPart {
  kernels::TransposedTaps rows, columns;
  bool operator==(const TransposedPart&) const = default;
};

// All that it depends on.
struct WeightRequest {
  const char* op;
  const Tensor& weight;               // int8 [groups * out_channels, in_channels, ...]
  const Tensor& weight_scale;         // float32 [groups * out_channels] or [1], contiguous
  const Tensor* bias;                 // int32 [groups * out_channels], contiguous, or nullptr
  const kernels::Conv2dShape& shape;  // the output's size does not matter
  kernels::Conv2dLayout layout = kernels::conv2d_layout(shape);  // not of a depthwise one
  bool depthwise = false;
  // Of a transposed convolution, whose weight is int8 [groups * in_channels, out_channels, ...].
  std::optional<TransposedPart> transposed = {};
  float x_scale = 1.0f;
  int32_t x_zero_point = 0;  // of unsigned codes
  float y_scale = 1.0f;      // 1 for float output
};

// Depends on the weight and the shape only.
struct PackedWeight {
  Tensor canonical;  // contiguous; undefined where the weight itself serves
  AlignedBuffer<int8_t> bytes;
  kernels::Conv2dLayout layout = kernels::Conv2dLayout::quads;
  int64_t size = 0;  // of bytes
  kernels::WeightSums sums;
};

// Depends on the scales, the zero point and the bias too.
using kernels::ChannelTerms;

std::shared_ptr<const PackedWeight> pack_weight(const WeightRequest& request);

// ValueError if a scale is bad or a channel's accumulator could leave int32.
std::shared_ptr<const ChannelTerms> channel_terms(const WeightRequest& request,
                                                  const PackedWeight& packed);

}  // namespace qtoolkit::ops
