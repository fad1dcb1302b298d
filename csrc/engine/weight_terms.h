// What the weights of convolutions have beside their codes.
#pragma once

#include <optional>

#include "engine/attributes.h"
#include "kernels/conv2d_terms.h"

namespace qtoolkit::engine {

// Scales of a weight, one or one for each output channel, and the bias.
struct WeightTerms {
  Constant scale;
  std::optional<Constant> bias;

  WeightTerms(Attributes& attributes, int64_t channels)
      : scale(attributes.constant("weight_scale", DType::float32, 1)) {
    require(scale.elements() == 1 || scale.elements() == channels,
            "weight_scale must hold one element or one for each output channel");
    if (!attributes.has("bias")) return;
    bias = attributes.constant("bias", DType::int32, 1);
    require(bias->elements() == channels, "bias must hold one element for each output channel");
  }

  // Of a canonical weight; without an output the result is float32.
  kernels::ChannelTerms of(const kernels::Conv2dShape& shape, bool depthwise, const QParams& input,
                           const std::optional<QParams>& output, const int8_t* weight) const {
    return kernels::channel_terms(
        {.shape = shape,
         .depthwise = depthwise,
         .weight_scale = static_cast<const float*>(scale.data.get()),
         .one_scale = scale.elements() == 1,
         .bias = bias ? static_cast<const int32_t*>(bias->data.get()) : nullptr,
         .x_scale = input.scale,
         .x_zero_point = input.zero_point,
         .y_scale = output ? output->scale : 1.0f},
        kernels::weight_sums(shape, weight));
  }
};

// Throws where so many products of one output could overflow its int32 sum.
inline void require_sums_fit(const kernels::Conv2dShape& shape) {
  constexpr int64_t kMostTaps = (int64_t{1} << 31) / (255 * 128);
  const int64_t taps =
      checked_product(checked_product(shape.in_channels, shape.kernel_height), shape.kernel_width);
  require(taps <= kMostTaps, taps, " products could overflow the int32 accumulator");
}

}  // namespace qtoolkit::engine
