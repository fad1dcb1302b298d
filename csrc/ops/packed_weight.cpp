#include "ops/packed_weight.h"

#include <ATen/ops/empty.h>

#include <stdexcept>

namespace qtoolkit::ops {
namespace {

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
  if (request.depthwise) {
    result->size = weight.numel();
    result->bytes = aligned_buffer<int8_t>(result->size);
    kernels::pack_conv2d_depthwise_weight(shape, w, result->bytes.get());
  } else {
    result->layout = request.layout;
    result->size = kernels::conv2d_packed_bytes(result->layout, shape, w);
    result->bytes = aligned_buffer<int8_t>(result->size);
    kernels::pack_conv2d_weight(result->layout, shape, w, result->bytes.get());
  }
  result->sums = kernels::weight_sums(shape, w);
  return result;
}

std::shared_ptr<const ChannelTerms> channel_terms(const WeightRequest& request,
                                                  const PackedWeight& packed) {
  const kernels::ChannelTermsArgs args{
      .shape = request.shape,
      .depthwise = request.depthwise,
      .weight_scale = request.weight_scale.const_data_ptr<float>(),
      .one_scale = request.weight_scale.numel() == 1,
      .bias = request.bias == nullptr ? nullptr : request.bias->const_data_ptr<int32_t>(),
      .x_scale = request.x_scale,
      .x_zero_point = request.x_zero_point,
      .y_scale = request.y_scale};
  try {
    return std::make_shared<ChannelTerms>(kernels::channel_terms(args, packed.sums));
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "qtoolkit::", request.op, ": ", error.what());
  }
}

}  // namespace qtoolkit::ops
