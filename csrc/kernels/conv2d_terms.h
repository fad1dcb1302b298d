// What the convolution kernels read beside the packed weight: an offset and a factor for each
// output channel, from the scales, the zero point and the bias.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// Of each output channel's weights, and of their absolute values. It depends on the weight alone.
struct WeightSums {
  std::vector<int64_t> sum, absolute_sum;
};
WeightSums weight_sums(const Conv2dShape& shape, const int8_t* weight);

// In the kernels' order of channels: padded_channels() of them, for depthwise groups.
struct ChannelTerms {
  std::vector<int32_t> offset;
  std::vector<float> multiplier;
};

struct ChannelTermsArgs {
  Conv2dShape shape;
  bool depthwise = false;
  const float* weight_scale = nullptr;  // [groups * out_channels], or [1] with one_scale
  bool one_scale = false;
  const int32_t* bias = nullptr;  // [groups * out_channels] or nullptr
  float x_scale = 1.0f;
  int32_t x_zero_point = 0;  // of unsigned codes
  float y_scale = 1.0f;      // 1 for float output
};

// offset[c] = bias[c] - x_zero_point * sum(w[c]), multiplier[c] = float(double(x_scale) *
// weight_scale[c] / y_scale). Throws std::invalid_argument if a weight scale is not positive and
// finite, a factor overflows float32, or a channel's accumulator could leave int32.
ChannelTerms channel_terms(const ChannelTermsArgs& args, const WeightSums& sums);

}  // namespace qtoolkit::kernels
