// The fully connected layer on 8-bit codes: a convolution of one tap whose pixels are the rows of
// x.
#include <torch/library.h>

#include "kernels/conv2d.h"
#include "ops/checks.h"
#include "ops/conv_args.h"
#include "ops/conv_run.h"
#include "ops/layout.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "linear";

Tensor linear_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                   const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                   const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                   int64_t quant_min, int64_t quant_max, bool /*relu*/) {
  check_codes(kOp, "x", x);
  check_qparams(kOp, "x_", x_scale, x_zero_point, x);
  check_rank(kOp, "weight", weight, 2);
  check_weight(kOp, x, weight, weight_scale, bias);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == weight.sym_size(1) && x.sym_size(-1) > 0,
                    "qtoolkit::linear: the last dimension of x ", describe(x),
                    " must be that of weight ", describe(weight), " and not empty");
  const at::ScalarType dtype =
      check_output_qparams(kOp, y_scale, y_zero_point, quant_min, quant_max, x);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return empty_beside(x, sizes, dtype, at::MemoryFormat::Contiguous);
}

Tensor linear_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                  const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                  const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                  int64_t quant_min, int64_t quant_max, bool relu) {
  Tensor y = linear_meta(x, x_scale, x_zero_point, weight, weight_scale, bias, y_scale,
                         y_zero_point, quant_min, quant_max, relu);
  const Tensor dense = x.contiguous();
  const int64_t channels = x.size(-1);
  const int64_t rows = x.numel() / channels;

  kernels::Conv2dArgs args;
  args.shape = {
      .out_height = 1, .out_width = rows, .in_channels = channels, .out_channels = weight.size(0)};
  check_accumulator(kOp, args.shape);
  const ConvParams params = read_conv_params(kOp, x, x_scale, x_zero_point, y_scale, y_zero_point,
                                             quant_min, quant_max, relu);
  set_output(args, params, y, weight.size(0));
  const PackedHandle packed =
      attach_weight(args, params, {kOp, weight, weight_scale, bias, /*depthwise=*/false});
  if (y.numel() == 0) return y;
  // A pixel a row, so that a copy, where one is needed, is shared among threads by rows.
  run_conv2d(args,
             {.x = static_cast<const uint8_t*>(dense.const_data_ptr()),
              .is_signed = params.x_signed,
              .height = rows,
              .channels = channels},
             /*depthwise=*/false);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "linear(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor weight_scale, "
      "Tensor? bias, Tensor? y_scale, Tensor? y_zero_point, int quant_min, int quant_max, "
      "bool relu) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("linear", linear_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("linear", linear_cpu); }

}  // namespace qtoolkit::ops
