// conv2d on a GPU. Values of scales and zero points are not checked: nothing waits for the device.
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include "ops/conv_args.h"
#include "ops/cuda/int8_conv.cuh"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "conv2d";
constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

Tensor conv2d_cuda(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                   const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                   int64_t groups, const OptionalTensor& y_scale,
                   const OptionalTensor& y_zero_point, int64_t quant_min, int64_t quant_max,
                   bool relu, const OptionalTensor& residual, const OptionalTensor& residual_scale,
                   const OptionalTensor& residual_zero_point) {
  static const auto op = find_operator<decltype(conv2d_cuda)>("qtoolkit::conv2d");
  const Tensor y =
      op.redispatch(kMeta, x, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding,
                    dilation, groups, y_scale, y_zero_point, quant_min, quant_max, relu, residual,
                    residual_scale, residual_zero_point);
  const gemm::Problem problem{.images = x.size(0),
                              .height = x.size(2),
                              .width = x.size(3),
                              .out_height = y.size(2),
                              .out_width = y.size(3),
                              .groups = groups,
                              .in_channels = x.size(1) / groups,
                              .out_channels = y.size(1) / groups,
                              .kernel_height = weight.size(2),
                              .kernel_width = weight.size(3),
                              .stride_height = stride[0],
                              .stride_width = stride[1],
                              .padding_height = padding[0],
                              .padding_width = padding[1],
                              .dilation_height = dilation[0],
                              .dilation_width = dilation[1]};
  check_accumulator(kOp, {.in_channels = problem.in_channels,
                          .kernel_height = problem.kernel_height,
                          .kernel_width = problem.kernel_width});
  if (y.numel() == 0) return y;
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(kFormat), dense_weight = weight.contiguous(kFormat);
  const Tensor scales = weight_scale.contiguous();
  const Tensor dense_bias = bias ? bias->contiguous() : Tensor();
  const Tensor dense_residual =
      residual ? residual->expand(y.sizes()).contiguous(kFormat) : Tensor();
  ConvOperands o;
  o.x = const_data<uint8_t>(dense);
  o.x_signed = x.scalar_type() == at::kChar;
  o.weight = const_data<int8_t>(dense_weight);
  o.weight_scale = const_data<float>(scales);
  o.scale_per_channel = scales.numel() > 1;
  if (bias) o.bias = const_data<int32_t>(dense_bias);
  o.x_qparams = {x_scale, x_zero_point};
  if (y_scale) {
    o.y_qparams = {*y_scale, *y_zero_point};
    o.range = check_quant_range(kOp, quant_min, quant_max);
  }
  if (residual) {
    o.residual = const_data<uint8_t>(dense_residual);
    o.residual_signed = residual->scalar_type() == at::kChar;
    o.residual_qparams = {*residual_scale, *residual_zero_point};
  }
  o.relu = relu;
  o.y = y.mutable_data_ptr();
  run_int8_conv(kOp, problem, o, x.options());
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) { m.impl("conv2d", conv2d_cuda); }

}  // namespace qtoolkit::ops
