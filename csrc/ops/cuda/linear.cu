// linear on a GPU: a convolution of one tap whose images are the rows of x.
#include <torch/library.h>

#include "ops/conv_args.h"
#include "ops/cuda/int8_conv.cuh"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "linear";

Tensor linear_cuda(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                   const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                   const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                   int64_t quant_min, int64_t quant_max, bool relu) {
  static const auto op = find_operator<decltype(linear_cuda)>("qtoolkit::linear");
  const Tensor y = op.redispatch(kMeta, x, x_scale, x_zero_point, weight, weight_scale, bias,
                                 y_scale, y_zero_point, quant_min, quant_max, relu);
  const int64_t channels = x.size(-1);
  check_accumulator(kOp, {.in_channels = channels});
  if (y.numel() == 0) return y;
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(), dense_weight = weight.contiguous();
  const Tensor scales = weight_scale.contiguous();
  const Tensor dense_bias = bias ? bias->contiguous() : Tensor();
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
  o.relu = relu;
  o.y = y.mutable_data_ptr();
  run_int8_conv(
      kOp,
      {.images = x.numel() / channels, .in_channels = channels, .out_channels = weight.size(0)}, o,
      x.options());
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) { m.impl("linear", linear_cuda); }

}  // namespace qtoolkit::ops
