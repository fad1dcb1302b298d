// Transposed convolution of 8-bit codes, with bias and ReLU fused: several convolutions that write
// their outputs between each other's.
#include "kernels/conv_transpose2d.h"

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "kernels/move.h"
#include "kernels/resample.h"
#include "ops/aligned_buffer.h"
#include "ops/checks.h"
#include "ops/conv_args.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/weight_cache.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "conv_transpose2d";
constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

c10::SymInt output_size(const char* which, const c10::SymInt& size,
                        const kernels::TransposedGeometry& geometry, const c10::SymInt& kernel,
                        int64_t output_padding) {
  TORCH_CHECK_VALUE(output_padding < std::max(geometry.stride, geometry.dilation),
                    "qtoolkit::conv_transpose2d: output_padding must be smaller than stride or "
                    "dilation, got ",
                    output_padding, " for the ", which);
  const c10::SymInt result = (size - 1) * geometry.stride - 2 * geometry.padding +
                             (kernel - 1) * geometry.dilation + output_padding + 1;
  TORCH_CHECK_VALUE(kernel > 0 && result > 0, "qtoolkit::conv_transpose2d: the output's ", which,
                    " would be ", result, "; use less padding");
  return result;
}

Tensor conv_transpose2d_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                             const Tensor& weight, const Tensor& weight_scale,
                             const OptionalTensor& bias, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef output_padding,
                             at::IntArrayRef dilation, int64_t groups,
                             const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                             int64_t quant_min, int64_t quant_max, bool /*relu*/) {
  check_codes(kOp, "x", x);
  check_rank(kOp, "x", x, 4);
  check_qparams(kOp, "x_", x_scale, x_zero_point, x);
  check_pair(kOp, "stride", stride, 1);
  check_pair(kOp, "padding", padding, 0);
  check_pair(kOp, "output_padding", output_padding, 0);
  check_pair(kOp, "dilation", dilation, 1);
  check_rank(kOp, "weight", weight, 4);
  const c10::SymInt channels = x.sym_size(1);
  TORCH_CHECK_VALUE(groups >= 1 && channels == weight.sym_size(0) && channels % groups == 0,
                    "qtoolkit::conv_transpose2d: weight ", describe(weight), " and groups ", groups,
                    " do not fit x ", describe(x),
                    "; weight must be [x.size(1), out_channels / groups, height, width] with "
                    "x.size(1) a multiple of groups");
  const c10::SymInt out_channels = weight.sym_size(1) * groups;
  check_weight(kOp, x, weight, out_channels, weight_scale, bias);
  TORCH_CHECK_VALUE(channels > 0 && x.sym_size(2) > 0 && x.sym_size(3) > 0,
                    "qtoolkit::conv_transpose2d: only the batch of x may be empty, got ",
                    describe(x));
  std::array<c10::SymInt, 4> sizes = {x.sym_size(0), out_channels, 0, 0};
  for (size_t i = 0; i < 2; ++i) {
    const auto d = static_cast<int64_t>(i) + 2;
    const kernels::TransposedGeometry geometry{
        .stride = stride[i], .padding = padding[i], .dilation = dilation[i]};
    sizes[i + 2] = output_size(i == 0 ? "height" : "width", x.sym_size(d), geometry,
                               weight.sym_size(d), output_padding[i]);
  }
  const at::ScalarType dtype =
      check_output_qparams(kOp, y_scale, y_zero_point, quant_min, quant_max, x);
  return empty_beside(x, sizes, dtype, kFormat);
}

// The input as the kernels read it: unsigned codes, with a border of the zero point.
class Source {
 public:
  Source(const Tensor& x, const ConvParams& params, const kernels::Border& rows,
         const kernels::Border& columns, bool overreads)
      : channels_(x.size(1)),
        height_(x.size(2) + rows.before + rows.after),
        width_(x.size(3) + columns.before + columns.after),
        before_(rows.before * width_ + columns.before),
        dense_(x.contiguous(kFormat)) {
    const bool bordered = height_ > x.size(2) || width_ > x.size(3);
    x_ = static_cast<const uint8_t*>(dense_.const_data_ptr());
    if (!bordered && !params.x_signed && !overreads) return;
    constexpr int64_t kMostBytes = int64_t{1} << 34;
    TORCH_CHECK_VALUE(height_ <= kMostBytes / channels_ / width_,
                      "qtoolkit::conv_transpose2d: an image of ", height_, " x ", width_,
                      " pixels, border included, is too large; check kernel and dilation");
    copy_ = aligned_buffer<uint8_t>(x.size(0) * image_stride() + kernels::kOverread);
    const auto from_rows =
        kernels::padded_sources(x.size(2), rows.before, rows.after, kernels::Padding::constant);
    const auto from_columns = kernels::padded_sources(x.size(3), columns.before, columns.after,
                                                      kernels::Padding::constant);
    const uint8_t flip = params.x_signed ? 0x80 : 0;
    const kernels::GatherPixelsArgs args{.x = x_,
                                         .y = copy_.get(),
                                         .x_image_stride = x.size(2) * x.size(3) * channels_,
                                         .x_row_stride = x.size(3) * channels_,
                                         .y_image_stride = image_stride(),
                                         .y_row_stride = row_stride(),
                                         .channels = channels_,
                                         .out_height = height_,
                                         .out_width = width_,
                                         .row_from = from_rows.data(),
                                         .column_from = from_columns.data(),
                                         .fill = static_cast<uint8_t>(params.x_zero_point ^ flip)};
    at::parallel_for(0, x.size(0) * height_, grain_of(kElementGrain, row_stride()),
                     [&](int64_t begin, int64_t end) {
                       kernels::gather_pixels(args, begin, end);
                       if (flip == 0) return;
                       uint8_t* const codes = copy_.get();
                       for (int64_t i = begin * row_stride(); i < end * row_stride(); ++i) {
                         codes[i] ^= flip;
                       }
                     });
    x_ = copy_.get();
  }

  int64_t row_stride() const { return width_ * channels_; }
  int64_t image_stride() const { return height_ * row_stride(); }
  // The pixel at a position of the input, which may lie in the border.
  const uint8_t* pixel(int64_t row, int64_t column) const {
    return x_ + (before_ + row * width_ + column) * channels_;
  }

 private:
  int64_t channels_, height_, width_, before_;
  Tensor dense_;
  AlignedBuffer<uint8_t> copy_;
  const uint8_t* x_ = nullptr;
};

// One of the convolutions, on all images.
struct Part {
  kernels::Conv2dArgs args;
  PackedHandle packed;
  bool depthwise;

  int64_t units() const {
    const kernels::Conv2dShape& shape = args.shape;
    return depthwise ? shape.images * shape.out_height : kernels::conv2d_units(shape);
  }
  void run(int64_t begin, int64_t end) const {
    if (!depthwise) return kernels::conv2d(args, begin, end);
    while (begin < end) {  // image by image
      kernels::Conv2dArgs own = args;
      own.shape.images = 1;
      const int64_t image = begin / own.shape.out_height, first = begin % own.shape.out_height;
      const int64_t last = std::min(own.shape.out_height, first + end - begin);
      own.x += image * args.x_image_stride;
      const int64_t bytes = args.output == kernels::Conv2dOutput::codes ? 1 : sizeof(float);
      own.y = static_cast<uint8_t*>(args.y) + image * args.y_image_stride * bytes;
      kernels::conv2d_depthwise(own, first, last);
      begin += last - first;
    }
  }
};

// Runs the units of all parts, one part after the other.
void run_parts(const std::vector<Part>& parts) {
  int64_t units = 0;
  int64_t products = 0;
  for (const Part& part : parts) {
    const kernels::Conv2dShape& s = part.args.shape;
    units += part.units();
    products +=
        s.pixels() * s.groups * s.out_channels * s.in_channels * s.kernel_height * s.kernel_width;
  }
  at::parallel_for(0, units, grain_of(kMultiplyGrain, products / units),
                   [&](int64_t begin, int64_t end) {
                     for (const Part& part : parts) {
                       const int64_t count = part.units();
                       if (begin < count && end > 0) {
                         part.run(std::max<int64_t>(begin, 0), std::min(end, count));
                       }
                       begin -= count;
                       end -= count;
                     }
                   });
}

Tensor conv_transpose2d_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                            const Tensor& weight, const Tensor& weight_scale,
                            const OptionalTensor& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef output_padding,
                            at::IntArrayRef dilation, int64_t groups, const OptionalTensor& y_scale,
                            const OptionalTensor& y_zero_point, int64_t quant_min,
                            int64_t quant_max, bool relu) {
  Tensor y = conv_transpose2d_meta(x, x_scale, x_zero_point, weight, weight_scale, bias, stride,
                                   padding, output_padding, dilation, groups, y_scale, y_zero_point,
                                   quant_min, quant_max, relu);
  const ConvParams params = read_conv_params(kOp, x, x_scale, x_zero_point, y_scale, y_zero_point,
                                             quant_min, quant_max, relu);
  const auto axes_of = [&](size_t i) {
    const auto d = static_cast<int64_t>(i) + 2;
    return kernels::transposed_axes({.kernel = weight.size(d),
                                     .stride = stride[i],
                                     .padding = padding[i],
                                     .dilation = dilation[i]},
                                    y.size(d));
  };
  const std::vector<kernels::TransposedAxis> rows = axes_of(0), columns = axes_of(1);
  const int64_t out_channels = y.size(1);
  std::vector<Part> parts;
  bool overreads = false;
  for (const kernels::TransposedAxis& row : rows) {
    for (const kernels::TransposedAxis& column : columns) {
      Part part;
      part.args.shape = {.images = x.size(0),
                         .out_height = row.outputs,
                         .out_width = column.outputs,
                         .groups = groups,
                         .in_channels = x.size(1) / groups,
                         .out_channels = out_channels / groups,
                         .kernel_height = row.kernel,
                         .kernel_width = column.kernel,
                         .dilation_height = row.dilation,
                         .dilation_width = column.dilation};
      const kernels::Conv2dShape& shape = part.args.shape;
      check_accumulator(kOp, shape);
      part.depthwise = groups > 1 && shape.in_channels == 1 && shape.out_channels == 1;
      overreads = overreads || (!part.depthwise && shape.overreads());
      part.packed = attach_weight(
          part.args, params,
          {kOp, weight, weight_scale, bias, part.depthwise, TransposedPart{row.taps, column.taps}});
      parts.push_back(std::move(part));
    }
  }
  if (y.numel() == 0) return y;
  const Source source(x, params, kernels::transposed_border(rows, x.size(2)),
                      kernels::transposed_border(columns, x.size(3)), overreads);
  const int64_t y_row = y.size(3) * out_channels;
  const int64_t y_bytes = y.element_size();
  for (size_t i = 0; i < parts.size(); ++i) {
    const kernels::TransposedAxis& row = rows[i / columns.size()];
    const kernels::TransposedAxis& column = columns[i % columns.size()];
    kernels::Conv2dArgs& args = parts[i].args;
    set_output(args, params, y, stride[1] * out_channels);
    args.y = static_cast<uint8_t*>(args.y) +
             (row.first_output * y_row + column.first_output * out_channels) * y_bytes;
    args.y_row_stride = stride[0] * y_row;
    args.y_image_stride = y.size(2) * y_row;
    args.x = source.pixel(row.first_input, column.first_input);
    args.x_pixel_stride = x.size(1);
    args.x_row_stride = source.row_stride();
    args.x_image_stride = source.image_stride();
  }
  run_parts(parts);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "conv_transpose2d(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, "
      "Tensor weight_scale, Tensor? bias, int[2] stride, int[2] padding, int[2] output_padding, "
      "int[2] dilation, int groups, Tensor? y_scale, Tensor? y_zero_point, int quant_min, "
      "int quant_max, bool relu) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("conv_transpose2d", conv_transpose2d_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("conv_transpose2d", conv_transpose2d_cpu); }

}  // namespace qtoolkit::ops
