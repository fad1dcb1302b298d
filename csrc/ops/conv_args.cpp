#include "ops/conv_args.h"

#include <c10/util/safe_numerics.h>

#include <array>

namespace qtoolkit::ops {

void check_weight(const char* op, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  const OptionalTensor& bias) {
  check_weight(op, x, weight, weight.sym_size(0), weight_scale, bias);
}

void check_weight(const char* op, const Tensor& x, const Tensor& weight,
                  const c10::SymInt& channels, const Tensor& weight_scale,
                  const OptionalTensor& bias) {
  check_dtype(op, "weight", weight, at::kChar);
  check_device(op, "weight", weight, x);
  check_dtype(op, "weight_scale", weight_scale, at::kFloat);
  check_device(op, "weight_scale", weight_scale, x);
  TORCH_CHECK_VALUE(channels > 0, "qtoolkit::", op, ": weight has no output channels, got ",
                    describe(weight));
  TORCH_CHECK_VALUE(weight_scale.dim() <= 1 &&
                        (weight_scale.sym_numel() == 1 || weight_scale.sym_numel() == channels),
                    "qtoolkit::", op, ": weight_scale must hold one element or one for each of ",
                    channels, " output channels, got ", describe(weight_scale));
  if (!bias) return;
  check_dtype(op, "bias", *bias, at::kInt);
  check_device(op, "bias", *bias, x);
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == channels, "qtoolkit::", op,
                    ": bias must hold one element for each of ", channels, " output channels, got ",
                    describe(*bias));
}

at::ScalarType check_output_qparams(const char* op, const OptionalTensor& y_scale,
                                    const OptionalTensor& y_zero_point, int64_t quant_min,
                                    int64_t quant_max, const Tensor& x) {
  TORCH_CHECK_VALUE(y_scale.has_value() == y_zero_point.has_value(), "qtoolkit::", op,
                    ": give both y_scale and y_zero_point for an output of codes, or neither for "
                    "float32");
  if (!y_scale) return at::kFloat;
  check_qparams(op, "y_", *y_scale, *y_zero_point, x);
  return check_quant_range(op, quant_min, quant_max).dtype();
}

void check_accumulator(const char* op, const kernels::Conv2dShape& shape) {
  constexpr int64_t kMostTaps = (int64_t{1} << 31) / (255 * 128);
  const int64_t taps = shape.in_channels * shape.kernel_height * shape.kernel_width;
  TORCH_CHECK_VALUE(taps <= kMostTaps, "qtoolkit::", op, ": ", taps,
                    " products for each output could overflow the int32 accumulator, which holds ",
                    kMostTaps, "; keep this layer in float");
}

void check_padded_size(const ConvImages& images) {
  constexpr uint64_t kMostBytes = uint64_t{1} << 34;
  if (images.padding_height == 0 && images.padding_width == 0) return;
  const std::array<uint64_t, 3> sizes = {
      static_cast<uint64_t>(images.height + 2 * images.padding_height),
      static_cast<uint64_t>(images.width + 2 * images.padding_width),
      static_cast<uint64_t>(images.channels)};
  uint64_t bytes = 0;
  const bool overflows = c10::safe_multiplies_u64(sizes, &bytes);
  TORCH_CHECK_VALUE(!overflows && bytes <= kMostBytes, "qtoolkit::conv2d: a padded image of ",
                    sizes[0], " x ", sizes[1], " x ", sizes[2], " bytes is too large, the most is ",
                    kMostBytes, "; check the padding");
}

ConvParams read_conv_params(const char* op, const Tensor& x, const Tensor& x_scale,
                            const Tensor& x_zero_point, const OptionalTensor& y_scale,
                            const OptionalTensor& y_zero_point, int64_t quant_min,
                            int64_t quant_max, bool relu) {
  ConvParams params;
  const CodeRange x_range = check_codes(op, "x", x);
  const QParams x_qparams = read_qparams(op, "x_", x_scale, x_zero_point, x_range);
  params.x_scale = x_qparams.scale;
  params.x_signed = x_range.is_signed();
  params.x_zero_point = x_qparams.zero_point - x_range.min;
  params.relu = relu;
  params.float_output = !y_scale.has_value();
  if (params.float_output) return params;
  params.y_range = check_quant_range(op, quant_min, quant_max);
  const QParams y_qparams = read_qparams(op, "y_", *y_scale, *y_zero_point, params.y_range);
  params.y_scale = y_qparams.scale;
  params.y_zero_point = y_qparams.zero_point;
  return params;
}

void set_output(kernels::Conv2dArgs& args, const ConvParams& params, const Tensor& y,
                int64_t y_pixel_stride) {
  args.y = y.mutable_data_ptr();
  args.y_pixel_stride = y_pixel_stride;
  args.output = params.float_output ? kernels::Conv2dOutput::float32 : kernels::Conv2dOutput::codes;
  args.zero_point = params.y_zero_point;
  args.lo = relu_bound(params.y_range, params.y_zero_point, params.relu);
  args.hi = params.y_range.max;
  args.relu = params.float_output && params.relu;
}

PackedHandle attach_weight(kernels::Conv2dArgs& args, const ConvParams& params,
                           const WeightTensors& tensors) {
  const Tensor scale = tensors.weight_scale.contiguous();
  const Tensor bias = tensors.bias ? tensors.bias->contiguous() : Tensor();
  PackedHandle packed = packed_weight({.op = tensors.op,
                                       .weight = tensors.weight,
                                       .weight_scale = scale,
                                       .bias = tensors.bias ? &bias : nullptr,
                                       .shape = args.shape,
                                       .depthwise = tensors.depthwise,
                                       .transposed = tensors.transposed,
                                       .x_scale = params.x_scale,
                                       .x_zero_point = params.x_zero_point,
                                       .y_scale = params.y_scale});
  const Tensor& canonical = packed.weight->canonical;
  args.weight = (canonical.defined() ? canonical : tensors.weight).const_data_ptr<int8_t>();
  args.packed = packed.weight->bytes.get();
  args.layout = packed.weight->layout;
  args.offset = packed.terms->offset.data();
  args.multiplier = packed.terms->multiplier.data();
  return packed;
}

}  // namespace qtoolkit::ops
