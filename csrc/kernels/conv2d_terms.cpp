#include "kernels/conv2d_terms.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace qtoolkit::kernels {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// The accumulator is bias + the sum of (x - x_zero_point) * w, and |x - x_zero_point| <= 255.
void check_channel(int64_t channel, int64_t bias, int64_t absolute_sum) {
  using Limits = std::numeric_limits<int32_t>;
  const int64_t products = 255 * absolute_sum;
  if (bias + products <= Limits::max() && bias - products >= Limits::min()) return;
  fail("the bias ", bias, " of output channel ", channel, " and products of up to ", products,
       " could overflow the int32 accumulator; use a larger weight_scale for this channel or keep "
       "this layer in float");
}

float checked_factor(const ChannelTermsArgs& args, int64_t channel) {
  const float weight_scale = args.weight_scale[args.one_scale ? 0 : channel];
  if (!std::isfinite(weight_scale) || weight_scale <= 0) {
    fail("weight_scale must be positive and finite, got ", weight_scale);
  }
  const double numerator = static_cast<double>(args.x_scale) * weight_scale;
  const auto factor = static_cast<float>(numerator / args.y_scale);
  if (!std::isfinite(factor)) {
    fail("the ratio of the input's and the output's scale, ", numerator, " / ", args.y_scale,
         ", overflows float32; check the scales");
  }
  return factor;
}

}  // namespace

WeightSums weight_sums(const Conv2dShape& shape, const int8_t* weight) {
  WeightSums result;
  const int64_t channels = shape.groups * shape.out_channels;
  const int64_t taps = shape.in_channels * shape.kernel_height * shape.kernel_width;
  for (int64_t c = 0; c < channels; ++c, weight += taps) {
    int64_t sum = 0;
    int64_t absolute_sum = 0;
    for (int64_t k = 0; k < taps; ++k) {
      sum += weight[k];
      absolute_sum += std::abs(weight[k]);
    }
    result.sum.push_back(sum);
    result.absolute_sum.push_back(absolute_sum);
  }
  return result;
}

ChannelTerms channel_terms(const ChannelTermsArgs& args, const WeightSums& sums) {
  const Conv2dShape& shape = args.shape;
  const int64_t group_stride = args.depthwise ? 1 : shape.blocks_per_group() * kChannelBlock;
  const auto length = static_cast<size_t>(shape.groups * group_stride);
  ChannelTerms result;
  result.offset.assign(length, 0);
  result.multiplier.assign(length, 0.0f);
  for (int64_t group = 0, c = 0; group < shape.groups; ++group) {
    for (int64_t i = 0; i < shape.out_channels; ++i, ++c) {
      const auto channel = static_cast<size_t>(c);
      const int64_t bias = args.bias == nullptr ? 0 : args.bias[c];
      check_channel(c, bias, sums.absolute_sum[channel]);
      const auto at = static_cast<size_t>(group * group_stride + i);
      result.offset[at] = static_cast<int32_t>(bias - args.x_zero_point * sums.sum[channel]);
      result.multiplier[at] = checked_factor(args, c);
    }
  }
  return result;
}

}  // namespace qtoolkit::kernels
