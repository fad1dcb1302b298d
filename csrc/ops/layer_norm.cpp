// Layer norm of 8-bit codes, with a result of codes or float32.
#include "kernels/layer_norm.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/checks.h"
#include "ops/conv_args.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "layer_norm";

void check_affine(const char* argument, const OptionalTensor& tensor, const Tensor& x,
                  at::IntArrayRef normalized_shape) {
  if (!tensor) return;
  check_dtype(kOp, argument, *tensor, at::kFloat);
  check_device(kOp, argument, *tensor, x);
  TORCH_CHECK_VALUE(tensor->sym_sizes() == c10::fromIntArrayRefSlow(normalized_shape),
                    "qtoolkit::layer_norm: ", argument, " must be of normalized_shape ",
                    normalized_shape, ", got ", describe(*tensor));
}

Tensor layer_norm_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                       at::IntArrayRef normalized_shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, const OptionalTensor& y_scale,
                       const OptionalTensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  check_codes(kOp, "x", x);
  check_qparams(kOp, "x_", x_scale, x_zero_point, x);
  const auto rank = static_cast<int64_t>(normalized_shape.size());
  bool fits = rank > 0 && rank <= x.dim();
  for (int64_t i = 0; fits && i < rank; ++i) {
    fits = normalized_shape[i] > 0 && x.sym_size(x.dim() - rank + i) == normalized_shape[i];
  }
  TORCH_CHECK_VALUE(fits, "qtoolkit::layer_norm: normalized_shape ", normalized_shape,
                    " must be that of the last dimensions of x ", describe(x), " and not empty");
  check_affine("weight", weight, x, normalized_shape);
  check_affine("bias", bias, x, normalized_shape);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0,
                    "qtoolkit::layer_norm: eps must not be negative, got ", eps);
  const at::ScalarType dtype =
      check_output_qparams(kOp, y_scale, y_zero_point, quant_min, quant_max, x);
  return empty_beside(x, x.sym_sizes(), dtype, at::MemoryFormat::Contiguous);
}

// float(parameter / y_scale), the division in double.
std::vector<float> in_steps(const char* argument, const OptionalTensor& parameter, float otherwise,
                            int64_t length, float y_scale) {
  const auto in_step = [=](float value) {
    return static_cast<float>(static_cast<double>(value) / static_cast<double>(y_scale));
  };
  std::vector<float> result(static_cast<size_t>(length), in_step(otherwise));
  if (parameter) {
    const Tensor values = parameter->contiguous();
    std::transform(values.const_data_ptr<float>(), values.const_data_ptr<float>() + length,
                   result.begin(), in_step);
  }
  TORCH_CHECK_VALUE(std::ranges::all_of(result, [](float step) { return std::isfinite(step); }),
                    "qtoolkit::layer_norm: ", argument, " / y_scale must be finite in float32; ",
                    "check ", argument, " and the calibration");
  return result;
}

Tensor layer_norm_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                      at::IntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps, const OptionalTensor& y_scale,
                      const OptionalTensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  Tensor y = layer_norm_meta(x, x_scale, x_zero_point, normalized_shape, weight, bias, eps, y_scale,
                             y_zero_point, quant_min, quant_max);
  const CodeRange x_range = check_codes(kOp, "x", x);
  const QParams x_qparams = read_qparams(kOp, "x_", x_scale, x_zero_point, x_range);
  const int64_t length = c10::multiply_integers(normalized_shape);
  constexpr int64_t kLongest = int64_t{1} << 23;
  TORCH_CHECK_VALUE(length <= kLongest, "qtoolkit::layer_norm: ", length,
                    " codes could overflow the int64 sum of a row, which holds ", kLongest);
  QParams y_qparams;
  kernels::LayerNormArgs args;
  if (y_scale) {
    const CodeRange range = check_quant_range(kOp, quant_min, quant_max);
    y_qparams = read_qparams(kOp, "y_", *y_scale, *y_zero_point, range);
    args.y = static_cast<uint8_t*>(y.mutable_data_ptr());
    args.zero_point = y_qparams.zero_point;
    args.lo = range.min;
    args.hi = range.max;
  } else {
    args.y_float = y.mutable_data_ptr<float>();
  }
  const std::vector<float> weights = in_steps("weight", weight, 1.0f, length, y_qparams.scale);
  const std::vector<float> biases = in_steps("bias", bias, 0.0f, length, y_qparams.scale);
  if (y.numel() == 0) return y;
  const Tensor dense = x.contiguous();
  args.x = static_cast<const uint8_t*>(dense.const_data_ptr());
  args.is_signed = x_range.is_signed();
  args.length = args.x_row_stride = args.y_row_stride = length;
  args.weight = weights.data();
  args.bias = biases.data();
  args.x_scale = x_qparams.scale;
  args.eps = eps;
  args.x_zero_point = x_qparams.zero_point;
  at::parallel_for(0, x.numel() / length, grain_of(kElementGrain, length),
                   [&](int64_t begin, int64_t end) { kernels::layer_norm(args, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "layer_norm(Tensor x, Tensor x_scale, Tensor x_zero_point, int[] normalized_shape, "
      "Tensor? weight, Tensor? bias, float eps, Tensor? y_scale, Tensor? y_zero_point, "
      "int quant_min, int quant_max) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("layer_norm", layer_norm_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("layer_norm", layer_norm_cpu); }

}  // namespace qtoolkit::ops
