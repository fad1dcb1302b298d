#include "ops/packed_weight.h"

#include <ATen/ops/empty.h>

#include <cstdlib>
#include <limits>

namespace qtoolkit::ops {
namespace {

// The accumulator is bias + the sum of (x - x_zero_point) * w, and |x - x_zero_point| <= 255.
void check_channel(const char* op, int64_t channel, int64_t bias, int64_t absolute_sum) {
  using Limits = std::numeric_limits<int32_t>;
  const int64_t products = 255 * absolute_sum;
  TORCH_CHECK_VALUE(bias + products <= Limits::max() && bias - products >= Limits::min(),
                    "qtoolkit::", op, ": the bias ", bias, " of output channel ", channel,
                    " and products of up to ", products,
                    " could overflow the int32 accumulator; use a larger weight_scale for this "
                    "channel or keep this layer in float");
}

// The weight of one of a transposed convolution's convolutions.
Tensor part_of(const Tensor& weight, const WeightRequest& request) {
  const kernels::Conv2dShape& s = request.shape;
  Tensor part = at::empty(
      {s.groups * s.out_channels, s.in_channels, s.kernel_height, s.kernel_width}, at::kChar);
  kernels::transposed_weight(s, request.transposed->rows, request.transposed->columns,
                             weight.size(2), weight.size(3), weight.const_data_ptr<int8_t>(),
                             part.mutable_data_ptr<int8_t>());
  return part;
}

}  // namespace

std::shared_ptr<const PackedWeight> pack_weight(const WeightRequest& request) {
  const kernels::Conv2dShape& shape = request.shape;
  auto result = std::make_shared<PackedWeight>();
  Tensor weight = request.weight;
  if (!weight.is_contiguous()) weight = result->canonical = weight.contiguous();
  if (request.transposed) weight = result->canonical = part_of(weight, request);
  const auto* w = weight.const_data_ptr<int8_t>();
  result->size = request.depthwise ? weight.numel() : shape.packed_bytes();
  result->bytes = aligned_buffer<int8_t>(result->size);
  const auto pack =
      request.depthwise ? kernels::pack_conv2d_depthwise_weight : kernels::pack_conv2d_weight;
  pack(shape, w, result->bytes.get());
  const int64_t channels = shape.groups * shape.out_channels;
  const int64_t taps = shape.in_channels * shape.kernel_height * shape.kernel_width;
  for (int64_t c = 0; c < channels; ++c, w += taps) {
    int64_t sum = 0;
    int64_t absolute_sum = 0;
    for (int64_t k = 0; k < taps; ++k) {
      sum += w[k];
      absolute_sum += std::abs(w[k]);
    }
    result->sum.push_back(sum);
    result->absolute_sum.push_back(absolute_sum);
  }
  return result;
}

std::shared_ptr<const ChannelTerms> channel_terms(const WeightRequest& request,
                                                  const PackedWeight& packed) {
  const kernels::Conv2dShape& shape = request.shape;
  const auto* scales = request.weight_scale.const_data_ptr<float>();
  const bool one_scale = request.weight_scale.numel() == 1;
  const auto* biases = request.bias == nullptr ? nullptr : request.bias->const_data_ptr<int32_t>();
  check_scales(request.op, "weight_scale",
               {scales, static_cast<size_t>(request.weight_scale.numel())});

  const int64_t group_stride =
      request.depthwise ? 1 : shape.blocks_per_group() * kernels::kChannelBlock;
  const auto length = static_cast<size_t>(shape.groups * group_stride);
  auto result = std::make_shared<ChannelTerms>();
  result->offset.assign(length, 0);
  result->multiplier.assign(length, 0.0f);
  for (int64_t group = 0, c = 0; group < shape.groups; ++group) {
    for (int64_t i = 0; i < shape.out_channels; ++i, ++c) {
      const auto channel = static_cast<size_t>(c);
      const int64_t bias = biases == nullptr ? 0 : biases[c];
      check_channel(request.op, c, bias, packed.absolute_sum[channel]);
      const auto at = static_cast<size_t>(group * group_stride + i);
      result->offset[at] = static_cast<int32_t>(bias - request.x_zero_point * packed.sum[channel]);
      result->multiplier[at] =
          multiplier(request.op, static_cast<double>(request.x_scale) * scales[one_scale ? 0 : c],
                     request.y_scale);
    }
  }
  return result;
}

}  // namespace qtoolkit::ops
