// Between float tensors and tensors of codes.
#include "kernels/quantize.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

using kernels::QuantizeArgs;

Tensor quantize_per_tensor_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "quantize_per_tensor";
  check_float(op, "x", x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  check_qparams(op, "", scale, zero_point, x);
  return empty_beside(x, x.sym_sizes(), range.dtype(), x.suggest_memory_format());
}

Tensor quantize_per_channel_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                 int64_t ch_axis, int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "quantize_per_channel";
  check_float(op, "x", x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  ch_axis = check_ch_axis(op, x, ch_axis);
  check_channel_qparams(op, scale, zero_point, x, x.sym_size(ch_axis));
  return empty_beside(x, x.sym_sizes(), range.dtype(), x.suggest_memory_format());
}

Tensor dequantize_per_tensor_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point) {
  constexpr const char* op = "dequantize_per_tensor";
  check_codes(op, "x", x);
  check_qparams(op, "", scale, zero_point, x);
  return empty_beside(x, x.sym_sizes(), at::kFloat, x.suggest_memory_format());
}

Tensor dequantize_per_channel_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                   int64_t ch_axis) {
  constexpr const char* op = "dequantize_per_channel";
  check_codes(op, "x", x);
  ch_axis = check_ch_axis(op, x, ch_axis);
  check_channel_qparams(op, scale, zero_point, x, x.sym_size(ch_axis));
  return empty_beside(x, x.sym_sizes(), at::kFloat, x.suggest_memory_format());
}

void quantize_into(const Tensor& y, const Tensor& x, QuantizeArgs args) {
  const Tensor dense = x.to(at::kFloat).contiguous(x.suggest_memory_format());
  args.x = dense.const_data_ptr<float>();
  args.y_codes = static_cast<uint8_t*>(y.mutable_data_ptr());
  at::parallel_for(0, x.numel(), kElementGrain,
                   [&](int64_t begin, int64_t end) { kernels::quantize(args, begin, end); });
}

void dequantize_into(const Tensor& y, const Tensor& x, QuantizeArgs args) {
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  args.codes = static_cast<const uint8_t*>(dense.const_data_ptr());
  args.y = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), kElementGrain,
                   [&](int64_t begin, int64_t end) { kernels::dequantize(args, begin, end); });
}

// Arguments for a whole tensor; `qparams` outlives them.
QuantizeArgs tensor_args(const Tensor& x, const QParams& qparams, CodeRange range) {
  return {.inner = x.numel(),
          .scale = &qparams.scale,
          .zero_point = &qparams.zero_point,
          .quant_min = range.min,
          .quant_max = range.max};
}

QuantizeArgs channel_args(const Tensor& x, int64_t ch_axis, const Tensor& scale,
                          const Tensor& zero_point, CodeRange range) {
  const ChannelView view = channel_view(x.sizes(), ch_axis, x.suggest_memory_format());
  return {.channels = view.channels,
          .inner = view.inner,
          .scale = scale.const_data_ptr<float>(),
          .zero_point = zero_point.const_data_ptr<int32_t>(),
          .quant_min = range.min,
          .quant_max = range.max};
}

Tensor quantize_per_tensor_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                               int64_t quant_min, int64_t quant_max) {
  const Tensor y = quantize_per_tensor_meta(x, scale, zero_point, quant_min, quant_max);
  const CodeRange range = check_quant_range("quantize_per_tensor", quant_min, quant_max);
  const QParams qparams = read_qparams("quantize_per_tensor", "", scale, zero_point, range);
  quantize_into(y, x, tensor_args(x, qparams, range));
  return y;
}

Tensor quantize_per_channel_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                int64_t ch_axis, int64_t quant_min, int64_t quant_max) {
  const Tensor y = quantize_per_channel_meta(x, scale, zero_point, ch_axis, quant_min, quant_max);
  const CodeRange range = check_quant_range("quantize_per_channel", quant_min, quant_max);
  const Tensor scales = scale.contiguous();
  const Tensor zero_points = zero_point.contiguous();
  read_channel_qparams("quantize_per_channel", scales, zero_points, range);
  ch_axis = check_ch_axis("quantize_per_channel", x, ch_axis);
  quantize_into(y, x, channel_args(x, ch_axis, scales, zero_points, range));
  return y;
}

Tensor dequantize_per_tensor_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point) {
  const Tensor y = dequantize_per_tensor_meta(x, scale, zero_point);
  const CodeRange range = check_codes("dequantize_per_tensor", "x", x);
  const QParams qparams = read_qparams("dequantize_per_tensor", "", scale, zero_point, range);
  dequantize_into(y, x, tensor_args(x, qparams, range));
  return y;
}

Tensor dequantize_per_channel_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                  int64_t ch_axis) {
  const Tensor y = dequantize_per_channel_meta(x, scale, zero_point, ch_axis);
  const CodeRange range = check_codes("dequantize_per_channel", "x", x);
  const Tensor scales = scale.contiguous();
  const Tensor zero_points = zero_point.contiguous();
  read_channel_qparams("dequantize_per_channel", scales, zero_points, range);
  ch_axis = check_ch_axis("dequantize_per_channel", x, ch_axis);
  dequantize_into(y, x, channel_args(x, ch_axis, scales, zero_points, range));
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "quantize_per_tensor(Tensor x, Tensor scale, Tensor zero_point, int quant_min, "
      "int quant_max) -> Tensor",
      tags);
  m.def(
      "quantize_per_channel(Tensor x, Tensor scale, Tensor zero_point, int ch_axis, "
      "int quant_min, int quant_max) -> Tensor",
      tags);
  m.def("dequantize_per_tensor(Tensor x, Tensor scale, Tensor zero_point) -> Tensor", tags);
  m.def("dequantize_per_channel(Tensor x, Tensor scale, Tensor zero_point, int ch_axis) -> Tensor",
        tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("quantize_per_tensor", quantize_per_tensor_meta);
  m.impl("quantize_per_channel", quantize_per_channel_meta);
  m.impl("dequantize_per_tensor", dequantize_per_tensor_meta);
  m.impl("dequantize_per_channel", dequantize_per_channel_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("quantize_per_tensor", quantize_per_tensor_cpu);
  m.impl("quantize_per_channel", quantize_per_channel_cpu);
  m.impl("dequantize_per_tensor", dequantize_per_tensor_cpu);
  m.impl("dequantize_per_channel", dequantize_per_channel_cpu);
}

}  // namespace qtoolkit::ops
