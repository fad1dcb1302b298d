// Convolution of 8-bit codes, with bias, residual addition and ReLU fused.
#include "kernels/conv2d.h"

#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <array>

#include "ops/checks.h"
#include "ops/conv_args.h"
#include "ops/conv_run.h"
#include "ops/layout.h"
#include "ops/weight_cache.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "conv2d";

// Up to so many planes of an NCHW image are interleaved in the pass that adds the border; more go
// through PyTorch's transposition. With 3 planes of 224 x 224 this measured 0.07 ms, that 0.17.
constexpr int64_t kMostPlanes = 4;

c10::SymInt output_size(const char* which, const c10::SymInt& size, const c10::SymInt& kernel,
                        int64_t stride, int64_t padding, int64_t dilation) {
  const c10::SymInt padded = size + 2 * padding;
  const c10::SymInt extent = (kernel - 1) * dilation + 1;
  TORCH_CHECK_VALUE(kernel > 0 && extent <= padded, "qtoolkit::conv2d: the kernel's ", which, " ",
                    extent, " (dilation included) is larger than the padded input's ", padded,
                    "; pad more or use a smaller kernel");
  return (padded - extent) / stride + 1;
}

// Checks everything but values and returns the output, not filled in.
Tensor conv2d_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                   const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                   int64_t groups, const OptionalTensor& y_scale,
                   const OptionalTensor& y_zero_point, int64_t quant_min, int64_t quant_max,
                   bool /*relu*/, const OptionalTensor& residual,
                   const OptionalTensor& residual_scale,
                   const OptionalTensor& residual_zero_point) {
  check_codes(kOp, "x", x);
  check_rank(kOp, "x", x, 4);
  check_qparams(kOp, "x_", x_scale, x_zero_point, x);
  check_pair(kOp, "stride", stride, 1);
  check_pair(kOp, "padding", padding, 0);
  check_pair(kOp, "dilation", dilation, 1);
  check_rank(kOp, "weight", weight, 4);
  check_weight(kOp, x, weight, weight_scale, bias);

  const c10::SymInt channels = x.sym_size(1);
  const c10::SymInt out_channels = weight.sym_size(0);
  TORCH_CHECK_VALUE(
      groups >= 1 && channels == weight.sym_size(1) * groups && out_channels % groups == 0,
      "qtoolkit::conv2d: weight ", describe(weight), " and groups ", groups, " do not fit x ",
      describe(x),
      "; weight must be [out_channels, x.size(1) / groups, height, width] with "
      "out_channels a multiple of groups");
  TORCH_CHECK_VALUE(channels > 0 && x.sym_size(2) > 0 && x.sym_size(3) > 0,
                    "qtoolkit::conv2d: only the batch of x may be empty, got ", describe(x));

  const auto format = at::MemoryFormat::ChannelsLast;
  const std::array<c10::SymInt, 4> sizes = {
      x.sym_size(0), out_channels,
      output_size("height", x.sym_size(2), weight.sym_size(2), stride[0], padding[0], dilation[0]),
      output_size("width", x.sym_size(3), weight.sym_size(3), stride[1], padding[1], dilation[1])};
  const at::ScalarType dtype =
      check_output_qparams(kOp, y_scale, y_zero_point, quant_min, quant_max, x);
  if (residual) {
    TORCH_CHECK_VALUE(y_scale,
                      "qtoolkit::conv2d: a residual needs an output of codes; give "
                      "y_scale and y_zero_point");
    TORCH_CHECK_VALUE(residual_scale && residual_zero_point,
                      "qtoolkit::conv2d: residual needs residual_scale and residual_zero_point");
    check_codes(kOp, "residual", *residual);
    check_device(kOp, "residual", *residual, x);
    check_qparams(kOp, "residual_", *residual_scale, *residual_zero_point, x);
    TORCH_CHECK_VALUE(at::is_expandable_to(residual->sym_sizes(), c10::SymIntArrayRef(sizes)),
                      "qtoolkit::conv2d: residual must have the output's shape ",
                      c10::SymIntArrayRef(sizes), " or broadcast to it, got ", describe(*residual));
  }
  return empty_beside(x, sizes, dtype, format);
}

Tensor conv2d_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                  const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t groups, const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                  int64_t quant_min, int64_t quant_max, bool relu, const OptionalTensor& residual,
                  const OptionalTensor& residual_scale, const OptionalTensor& residual_zero_point) {
  Tensor y = conv2d_meta(x, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding,
                         dilation, groups, y_scale, y_zero_point, quant_min, quant_max, relu,
                         residual, residual_scale, residual_zero_point);
  const int64_t channels = x.size(1);
  const bool planar = channels <= kMostPlanes && x.is_contiguous() &&
                      !x.is_contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor dense = planar ? x : x.contiguous(at::MemoryFormat::ChannelsLast);

  ConvImages images{.x = static_cast<const uint8_t*>(dense.const_data_ptr()),
                    .planar = planar,
                    .batch = x.size(0),
                    .height = x.size(2),
                    .width = x.size(3),
                    .channels = channels,
                    .padding_height = padding[0],
                    .padding_width = padding[1]};
  kernels::Conv2dArgs args;
  args.shape = {.out_height = y.size(2),
                .out_width = y.size(3),
                .groups = groups,
                .in_channels = channels / groups,
                .out_channels = y.size(1) / groups,
                .kernel_height = weight.size(2),
                .kernel_width = weight.size(3),
                .stride_height = stride[0],
                .stride_width = stride[1],
                .dilation_height = dilation[0],
                .dilation_width = dilation[1]};
  kernels::Conv2dShape& shape = args.shape;
  check_accumulator(kOp, shape);
  check_padded_size(images);
  const bool depthwise = groups > 1 && shape.in_channels == 1 && shape.out_channels == 1;

  const ConvParams params = read_conv_params(kOp, x, x_scale, x_zero_point, y_scale, y_zero_point,
                                             quant_min, quant_max, relu);
  set_output(args, params, y, y.size(1));
  images.is_signed = params.x_signed;
  images.border = static_cast<uint8_t>(params.x_zero_point);

  Tensor dense_residual;
  if (residual) {
    dense_residual = residual->expand(y.sizes()).contiguous(at::MemoryFormat::ChannelsLast);
    const CodeRange range = check_codes(kOp, "residual", *residual);
    const QParams qparams =
        read_qparams(kOp, "residual_", *residual_scale, *residual_zero_point, range);
    args.residual = dense_residual.const_data_ptr();
    args.residual_pixel_stride = y.size(1);
    args.residual_signed = range.is_signed();
    args.residual_zero_point = qparams.zero_point;
    args.residual_multiplier = multiplier(kOp, qparams.scale, params.y_scale);
  }

  const PackedHandle packed =
      attach_weight(args, params, {kOp, weight, weight_scale, bias, depthwise});
  if (y.numel() == 0) return y;
  // Without taps beside the pixel itself the batch is one long row.
  const bool one_tap = shape.kernel_height == 1 && shape.kernel_width == 1 && stride[0] == 1 &&
                       stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  if (one_tap && !depthwise && !images.is_signed && !planar && !shape.overreads()) {
    images.width *= images.batch * images.height;
    images.batch = images.height = 1;
    shape.out_width = images.width;
    shape.out_height = 1;
  }
  run_conv2d(args, images, depthwise);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "conv2d(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? y_scale, "
      "Tensor? y_zero_point, int quant_min, int quant_max, bool relu, Tensor? residual, "
      "Tensor? residual_scale, Tensor? residual_zero_point) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("conv2d", conv2d_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("conv2d", conv2d_cpu); }

}  // namespace qtoolkit::ops
