// From codes to codes of other parameters, element by element: requantization and batch norm.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "kernels/elementwise.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

Tensor requantize_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                       const Tensor& y_scale, const Tensor& y_zero_point, int64_t quant_min,
                       int64_t quant_max, bool /*relu*/) {
  constexpr const char* op = "requantize";
  check_codes(op, "x", x);
  check_qparams(op, "x_", x_scale, x_zero_point, x);
  check_qparams(op, "y_", y_scale, y_zero_point, x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  return empty_beside(x, x.sym_sizes(), range.dtype(), x.suggest_memory_format());
}

Tensor batch_norm_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                       const Tensor& weight, const Tensor& bias, const Tensor& y_scale,
                       const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max,
                       bool /*relu*/) {
  constexpr const char* op = "batch_norm";
  check_codes(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2 || x.dim() == 4, "qtoolkit::", op,
                    ": x must be [N, C] or [N, C, H, W], got ", describe(x));
  check_qparams(op, "x_", x_scale, x_zero_point, x);
  check_qparams(op, "y_", y_scale, y_zero_point, x);
  const auto check_affine = [&](const char* argument, const Tensor& tensor) {
    check_dtype(op, argument, tensor, at::kFloat);
    check_device(op, argument, tensor, x);
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == x.sym_size(1), "qtoolkit::", op,
                      ": ", argument, " must hold one element for each of ", x.sym_size(1),
                      " channels, got ", describe(tensor));
  };
  check_affine("weight", weight);
  check_affine("bias", bias);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  return empty_beside(x, x.sym_sizes(), range.dtype(),
                      x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// The part of the arguments that both operators share.
struct Setting {
  kernels::RequantizeArgs args;
  QParams x, y;
};
Setting read_setting(const char* op, const Tensor& x, const Tensor& x_scale,
                     const Tensor& x_zero_point, const Tensor& y_scale, const Tensor& y_zero_point,
                     int64_t quant_min, int64_t quant_max, bool relu) {
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const CodeRange x_range = check_codes(op, "x", x);
  Setting setting;
  setting.x = read_qparams(op, "x_", x_scale, x_zero_point, x_range);
  setting.y = read_qparams(op, "y_", y_scale, y_zero_point, range);
  setting.args.x_signed = x_range.is_signed();
  setting.args.x_zero_point = setting.x.zero_point;
  setting.args.zero_point = setting.y.zero_point;
  setting.args.lo = relu_bound(range, setting.y.zero_point, relu);
  setting.args.hi = range.max;
  return setting;
}

Tensor requantize_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                      const Tensor& y_scale, const Tensor& y_zero_point, int64_t quant_min,
                      int64_t quant_max, bool relu) {
  constexpr const char* op = "requantize";
  Tensor y =
      requantize_meta(x, x_scale, x_zero_point, y_scale, y_zero_point, quant_min, quant_max, relu);
  Setting setting =
      read_setting(op, x, x_scale, x_zero_point, y_scale, y_zero_point, quant_min, quant_max, relu);
  const float factor = multiplier(op, setting.x.scale, setting.y.scale);
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  auto* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  setting.args.multiplier = &factor;
  // A stretch of elements is one row.
  at::parallel_for(0, x.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    kernels::RequantizeArgs args = setting.args;
    args.x = from + begin;
    args.y = to + begin;
    args.channels = args.x_row_stride = args.y_row_stride = end - begin;
    kernels::requantize(args, 0, 1);
  });
  return y;
}

Tensor batch_norm_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                      const Tensor& weight, const Tensor& bias, const Tensor& y_scale,
                      const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max, bool relu) {
  constexpr const char* op = "batch_norm";
  Tensor y = batch_norm_meta(x, x_scale, x_zero_point, weight, bias, y_scale, y_zero_point,
                             quant_min, quant_max, relu);
  Setting setting =
      read_setting(op, x, x_scale, x_zero_point, y_scale, y_zero_point, quant_min, quant_max, relu);
  const int64_t channels = x.size(1);
  const Tensor weights = weight.contiguous();
  const Tensor biases = bias.contiguous();
  std::vector<float> factors(static_cast<size_t>(channels));
  std::vector<float> addends(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    const double w = weights.const_data_ptr<float>()[c];
    const double b = biases.const_data_ptr<float>()[c];
    TORCH_CHECK_VALUE(std::isfinite(w) && std::isfinite(b), "qtoolkit::", op,
                      ": weight and bias must be finite, got ", w, " and ", b, " for channel ", c);
    factors[c] = multiplier(op, static_cast<double>(setting.x.scale) * w, setting.y.scale,
                            "x_scale * weight / y_scale");
    addends[c] = multiplier(op, b, setting.y.scale, "bias / y_scale");
  }
  const Tensor dense =
      x.contiguous(x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  setting.args.x = static_cast<const uint8_t*>(dense.const_data_ptr());
  setting.args.y = static_cast<uint8_t*>(y.mutable_data_ptr());
  setting.args.channels = setting.args.x_row_stride = setting.args.y_row_stride = channels;
  setting.args.channels_apart = true;
  setting.args.multiplier = factors.data();
  setting.args.addend = addends.data();
  if (y.numel() == 0) return y;
  at::parallel_for(
      0, x.numel() / channels, grain_of(kElementGrain, channels),
      [&](int64_t begin, int64_t end) { kernels::requantize(setting.args, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "requantize(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor y_scale, "
      "Tensor y_zero_point, int quant_min, int quant_max, bool relu) -> Tensor",
      tags);
  m.def(
      "batch_norm(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor bias, "
      "Tensor y_scale, Tensor y_zero_point, int quant_min, int quant_max, bool relu) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("requantize", requantize_meta);
  m.impl("batch_norm", batch_norm_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("requantize", requantize_cpu);
  m.impl("batch_norm", batch_norm_cpu);
}

}  // namespace qtoolkit::ops
