// Pooling of 8-bit codes. The output is channels_last.
#include "kernels/pooling.h"

#include <torch/library.h>

#include <limits>
#include <stdexcept>
#include <vector>

#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/windows.h"

namespace qtoolkit::ops {
namespace {

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

using kernels::Spans;

Tensor max_pool2d_meta(const Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  constexpr const char* op = "max_pool2d";
  check_codes(op, "x", x);
  check_rank(op, "x", x, 4);
  const Windows windows = check_windows(op, kernel_size, stride, padding, dilation, ceil_mode);
  return empty_beside(x,
                      {x.sym_size(0), x.sym_size(1), output_size(op, x.sym_size(2), windows.rows),
                       output_size(op, x.sym_size(3), windows.columns)},
                      x.scalar_type(), kFormat);
}

Tensor avg_pool2d_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                       at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                       bool ceil_mode, bool /*count_include_pad*/,
                       std::optional<int64_t> divisor_override, const Tensor& y_scale,
                       const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "avg_pool2d";
  check_codes(op, "x", x);
  check_rank(op, "x", x, 4);
  check_qparams(op, "x_", x_scale, x_zero_point, x);
  check_qparams(op, "y_", y_scale, y_zero_point, x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const Windows windows = check_windows(op, kernel_size, stride, padding, {1, 1}, ceil_mode);
  TORCH_CHECK_VALUE(!divisor_override || *divisor_override > 0,
                    "qtoolkit::avg_pool2d: divisor_override must be positive, got ",
                    divisor_override.value_or(0));
  return empty_beside(x,
                      {x.sym_size(0), x.sym_size(1), output_size(op, x.sym_size(2), windows.rows),
                       output_size(op, x.sym_size(3), windows.columns)},
                      range.dtype(), kFormat);
}

Tensor adaptive_avg_pool2d_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                                at::IntArrayRef output_size, const Tensor& y_scale,
                                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "adaptive_avg_pool2d";
  check_codes(op, "x", x);
  check_rank(op, "x", x, 4);
  TORCH_CHECK_VALUE(x.sym_size(2) > 0 && x.sym_size(3) > 0,
                    "qtoolkit::adaptive_avg_pool2d: only the batch of x may be empty, got ",
                    describe(x));
  check_qparams(op, "x_", x_scale, x_zero_point, x);
  check_qparams(op, "y_", y_scale, y_zero_point, x);
  check_pair(op, "output_size", output_size, 1);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  return empty_beside(x, {x.sym_size(0), x.sym_size(1), output_size[0], output_size[1]},
                      range.dtype(), kFormat);
}

Tensor max_pool2d_cpu(const Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  Tensor y = max_pool2d_meta(x, kernel_size, stride, padding, dilation, ceil_mode);
  const Windows windows =
      check_windows("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode);
  const Tensor dense = x.contiguous(kFormat);
  Spans rows, columns;
  try {
    rows = kernels::max_pool_spans(x.size(2), y.size(2), windows.rows);
    columns = kernels::max_pool_spans(x.size(3), y.size(3), windows.columns);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "qtoolkit::max_pool2d: ", error.what());
  }
  const kernels::MaxPool2dArgs args{.x = static_cast<const uint8_t*>(dense.const_data_ptr()),
                                    .y = static_cast<uint8_t*>(y.mutable_data_ptr()),
                                    .is_signed = x.scalar_type() == at::kChar,
                                    .channels = x.size(1),
                                    .out_height = y.size(2),
                                    .out_width = y.size(3),
                                    .x_row_stride = x.size(3) * x.size(1),
                                    .x_image_stride = x.size(2) * x.size(3) * x.size(1),
                                    .y_row_stride = y.size(3) * y.size(1),
                                    .y_image_stride = y.size(2) * y.size(3) * y.size(1),
                                    .row_begin = rows.begin.data(),
                                    .row_end = rows.end.data(),
                                    .row_step = dilation[0],
                                    .column_begin = columns.begin.data(),
                                    .column_end = columns.end.data(),
                                    .column_step = dilation[1]};
  if (y.numel() == 0) return y;
  const int64_t row_cost = y.size(3) * y.size(1) * kernel_size[0] * kernel_size[1];
  at::parallel_for(0, y.size(0) * y.size(2), grain_of(kElementGrain, row_cost),
                   [&](int64_t begin, int64_t end) { kernels::max_pool2d(args, begin, end); });
  return y;
}

// Fills y, the output of a checked operator.
void average_into(const char* op, const Tensor& y, const Tensor& x, const Spans& rows,
                  const Spans& columns, const QParams& x_qparams, const QParams& y_qparams,
                  CodeRange range) {
  if (y.numel() == 0) return;
  const int64_t row_span = rows.longest();
  const int64_t column_span = columns.longest();
  constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max() / 255;
  TORCH_CHECK_VALUE(row_span <= kMostPixels / column_span, "qtoolkit::", op, ": a window of ",
                    row_span, " x ", column_span, " pixels could overflow the int32 sum");
  const Tensor dense = x.contiguous(kFormat);
  // Checks that the quotient fits float32; the kernel divides it further.
  multiplier(op, x_qparams.scale, y_qparams.scale);
  const kernels::AvgPool2dArgs args{
      .x = static_cast<const uint8_t*>(dense.const_data_ptr()),
      .y = static_cast<uint8_t*>(y.mutable_data_ptr()),
      .x_signed = x.scalar_type() == at::kChar,
      .channels = x.size(1),
      .out_height = y.size(2),
      .out_width = y.size(3),
      .x_row_stride = x.size(3) * x.size(1),
      .x_image_stride = x.size(2) * x.size(3) * x.size(1),
      .y_row_stride = y.size(3) * y.size(1),
      .y_image_stride = y.size(2) * y.size(3) * y.size(1),
      .row_begin = rows.begin.data(),
      .row_end = rows.end.data(),
      .column_begin = columns.begin.data(),
      .column_end = columns.end.data(),
      .row_divisor = rows.divisor.data(),
      .column_divisor = columns.divisor.data(),
      .multiplier = static_cast<double>(x_qparams.scale) / y_qparams.scale,
      .x_zero_point = x_qparams.zero_point,
      .zero_point = y_qparams.zero_point,
      .lo = range.min,
      .hi = range.max};
  const int64_t row_cost = y.size(3) * y.size(1) * row_span * column_span;
  at::parallel_for(0, y.size(0) * y.size(2), grain_of(kElementGrain, row_cost),
                   [&](int64_t begin, int64_t end) { kernels::avg_pool2d(args, begin, end); });
}

Tensor avg_pool2d_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                      at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      bool ceil_mode, bool count_include_pad,
                      std::optional<int64_t> divisor_override, const Tensor& y_scale,
                      const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "avg_pool2d";
  Tensor y = avg_pool2d_meta(x, x_scale, x_zero_point, kernel_size, stride, padding, ceil_mode,
                             count_include_pad, divisor_override, y_scale, y_zero_point, quant_min,
                             quant_max);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const QParams x_qparams = read_qparams(op, "x_", x_scale, x_zero_point, check_codes(op, "x", x));
  const QParams y_qparams = read_qparams(op, "y_", y_scale, y_zero_point, range);
  const Windows windows = check_windows(op, kernel_size, stride, padding, {1, 1}, ceil_mode);
  Spans rows = kernels::avg_pool_spans(x.size(2), y.size(2), windows.rows, count_include_pad);
  Spans columns = kernels::avg_pool_spans(x.size(3), y.size(3), windows.columns, count_include_pad);
  if (divisor_override) {
    rows.divisor.assign(rows.divisor.size(), *divisor_override);
    columns.divisor.assign(columns.divisor.size(), 1);
  }
  average_into(op, y, x, rows, columns, x_qparams, y_qparams, range);
  return y;
}

Tensor adaptive_avg_pool2d_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                               at::IntArrayRef output_size, const Tensor& y_scale,
                               const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "adaptive_avg_pool2d";
  Tensor y = adaptive_avg_pool2d_meta(x, x_scale, x_zero_point, output_size, y_scale, y_zero_point,
                                      quant_min, quant_max);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const QParams x_qparams = read_qparams(op, "x_", x_scale, x_zero_point, check_codes(op, "x", x));
  const QParams y_qparams = read_qparams(op, "y_", y_scale, y_zero_point, range);
  average_into(op, y, x, kernels::adaptive_pool_spans(x.size(2), output_size[0]),
               kernels::adaptive_pool_spans(x.size(3), output_size[1]), x_qparams, y_qparams,
               range);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "bool ceil_mode) -> Tensor",
      tags);
  m.def(
      "avg_pool2d(Tensor x, Tensor x_scale, Tensor x_zero_point, int[2] kernel_size, "
      "int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, "
      "int? divisor_override, Tensor y_scale, Tensor y_zero_point, int quant_min, int quant_max) "
      "-> Tensor",
      tags);
  m.def(
      "adaptive_avg_pool2d(Tensor x, Tensor x_scale, Tensor x_zero_point, int[2] output_size, "
      "Tensor y_scale, Tensor y_zero_point, int quant_min, int quant_max) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("max_pool2d", max_pool2d_meta);
  m.impl("avg_pool2d", avg_pool2d_meta);
  m.impl("adaptive_avg_pool2d", adaptive_avg_pool2d_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("max_pool2d", max_pool2d_cpu);
  m.impl("avg_pool2d", avg_pool2d_cpu);
  m.impl("adaptive_avg_pool2d", adaptive_avg_pool2d_cpu);
}

}  // namespace qtoolkit::ops
