// Upsampling of 8-bit codes. The output is channels_last.
#include "kernels/upsample.h"

#include <torch/library.h>

#include "kernels/move.h"
#include "kernels/resample.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/resize.h"

namespace qtoolkit::ops {
namespace {

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

Tensor upsample_nearest2d_meta(const Tensor& x, OptionalSizes size, OptionalFactors scale_factors,
                               bool /*exact*/) {
  const ResizedImage image = resize("upsample_nearest2d", x, size, scale_factors);
  return empty_beside(x, image.sizes, x.scalar_type(), kFormat);
}

Tensor upsample_nearest2d_cpu(const Tensor& x, OptionalSizes size, OptionalFactors scale_factors,
                              bool exact) {
  const ResizedImage image = resize("upsample_nearest2d", x, size, scale_factors);
  Tensor y = upsample_nearest2d_meta(x, size, scale_factors, exact);
  if (y.numel() == 0) return y;
  const Tensor dense = x.contiguous(kFormat);
  const auto rows = kernels::nearest_sources(x.size(2), y.size(2), image.height_factor, exact);
  const auto columns = kernels::nearest_sources(x.size(3), y.size(3), image.width_factor, exact);
  const int64_t channels = x.size(1);
  const kernels::GatherPixelsArgs args{.x = static_cast<const uint8_t*>(dense.const_data_ptr()),
                                       .y = static_cast<uint8_t*>(y.mutable_data_ptr()),
                                       .x_image_stride = x.size(2) * x.size(3) * channels,
                                       .x_row_stride = x.size(3) * channels,
                                       .y_image_stride = y.size(2) * y.size(3) * channels,
                                       .y_row_stride = y.size(3) * channels,
                                       .channels = channels,
                                       .out_height = y.size(2),
                                       .out_width = y.size(3),
                                       .row_from = rows.data(),
                                       .column_from = columns.data()};
  at::parallel_for(0, y.size(0) * y.size(2), grain_of(kElementGrain, args.y_row_stride),
                   [&](int64_t begin, int64_t end) { kernels::gather_pixels(args, begin, end); });
  return y;
}

Tensor upsample_bilinear2d_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                                OptionalSizes size, OptionalFactors scale_factors,
                                bool /*align_corners*/, const Tensor& y_scale,
                                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "upsample_bilinear2d";
  const ResizedImage image = resize(op, x, size, scale_factors);
  check_qparams(op, "x_", x_scale, x_zero_point, x);
  check_qparams(op, "y_", y_scale, y_zero_point, x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  return empty_beside(x, image.sizes, range.dtype(), kFormat);
}

Tensor upsample_bilinear2d_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                               OptionalSizes size, OptionalFactors scale_factors,
                               bool align_corners, const Tensor& y_scale,
                               const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "upsample_bilinear2d";
  const ResizedImage image = resize(op, x, size, scale_factors);
  Tensor y = upsample_bilinear2d_meta(x, x_scale, x_zero_point, size, scale_factors, align_corners,
                                      y_scale, y_zero_point, quant_min, quant_max);
  const CodeRange x_range = check_codes(op, "x", x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const QParams x_qparams = read_qparams(op, "x_", x_scale, x_zero_point, x_range);
  const QParams y_qparams = read_qparams(op, "y_", y_scale, y_zero_point, range);
  const float factor = multiplier(op, x_qparams.scale, y_qparams.scale);
  if (y.numel() == 0) return y;
  const Tensor dense = x.contiguous(kFormat);
  const auto rows =
      kernels::linear_sources(x.size(2), y.size(2), image.height_factor, align_corners);
  auto columns = kernels::linear_sources(x.size(3), y.size(3), image.width_factor, align_corners);
  for (kernels::LinearSource& column : columns) {
    column.first_weight *= factor;
    column.second_weight *= factor;
  }
  const int64_t channels = x.size(1);
  const kernels::UpsampleBilinear2dArgs args{
      .x = static_cast<const uint8_t*>(dense.const_data_ptr()),
      .y = static_cast<uint8_t*>(y.mutable_data_ptr()),
      .x_signed = x_range.is_signed(),
      .x_image_stride = x.size(2) * x.size(3) * channels,
      .x_row_stride = x.size(3) * channels,
      .y_image_stride = y.size(2) * y.size(3) * channels,
      .y_row_stride = y.size(3) * channels,
      .channels = channels,
      .out_height = y.size(2),
      .out_width = y.size(3),
      .rows = rows.data(),
      .columns = columns.data(),
      .x_zero_point = x_qparams.zero_point,
      .zero_point = y_qparams.zero_point,
      .lo = range.min,
      .hi = range.max};
  at::parallel_for(
      0, y.size(0) * y.size(2), grain_of(kElementGrain, args.y_row_stride),
      [&](int64_t begin, int64_t end) { kernels::upsample_bilinear2d(args, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "upsample_nearest2d(Tensor x, SymInt[]? size, float[]? scale_factors, bool exact) -> Tensor",
      tags);
  m.def(
      "upsample_bilinear2d(Tensor x, Tensor x_scale, Tensor x_zero_point, SymInt[]? size, "
      "float[]? scale_factors, bool align_corners, Tensor y_scale, Tensor y_zero_point, "
      "int quant_min, int quant_max) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("upsample_nearest2d", upsample_nearest2d_meta);
  m.impl("upsample_bilinear2d", upsample_bilinear2d_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("upsample_nearest2d", upsample_nearest2d_cpu);
  m.impl("upsample_bilinear2d", upsample_bilinear2d_cpu);
}

}  // namespace qtoolkit::ops
