// Padding of 8-bit codes, of which the constant is real 0.
#include <torch/library.h>

#include "kernels/move.h"
#include "kernels/resample.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

using kernels::Padding;

constexpr const char* kOp = "pad";

Padding check_mode(c10::string_view mode) {
  if (mode == "constant") return Padding::constant;
  if (mode == "reflect") return Padding::reflect;
  if (mode == "replicate") return Padding::replicate;
  TORCH_CHECK_VALUE(mode == "circular", "qtoolkit::pad: mode must be \"constant\", \"reflect\", ",
                    "\"replicate\" or \"circular\", got \"", mode, "\"");
  return Padding::circular;
}

// Images of which rows and columns are padded have a kernel.
bool is_image(const Tensor& x, size_t pads) { return x.dim() == 4 && pads <= 4; }

Tensor pad_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                c10::SymIntArrayRef pad, c10::string_view mode) {
  check_codes(kOp, "x", x);
  check_qparams(kOp, "x_", x_scale, x_zero_point, x);
  const Padding padding = check_mode(mode);
  const int64_t rank = x.dim();
  const auto padded = static_cast<int64_t>(pad.size() / 2);
  TORCH_CHECK_VALUE(pad.size() % 2 == 0 && padded <= rank,
                    "qtoolkit::pad: pad must hold two "
                    "numbers for each padded dimension, the last one first, got ",
                    pad, " for x ", describe(x));
  TORCH_CHECK_VALUE(padding == Padding::constant || padded <= 2,
                    "qtoolkit::pad: only the last two dimensions can be padded with other than a "
                    "constant, got ",
                    pad);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t d = rank - 1 - i;
    const c10::SymInt size = sizes[d];
    for (const c10::SymInt& side : {pad[2 * i], pad[2 * i + 1]}) {
      const bool fits = padding == Padding::constant || padding == Padding::replicate ||
                        side < size || (padding == Padding::circular && side == size);
      TORCH_CHECK_VALUE(fits, "qtoolkit::pad: padding of ", side, " in mode \"", mode,
                        "\" is too much for a dimension of ", size);
    }
    sizes[d] = size + pad[2 * i] + pad[2 * i + 1];
    TORCH_CHECK_VALUE(sizes[d] > 0 && (size > 0 || padding == Padding::constant),
                      "qtoolkit::pad: pad ", pad, " leaves nothing of x ", describe(x));
  }
  const auto format =
      is_image(x, pad.size()) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return empty_beside(x, sizes, x.scalar_type(), format);
}

// The output of padding rows and columns of [batch, height, width, channels] in memory.
struct Padded {
  int64_t batch, height, width, channels;
  std::vector<int64_t> rows, columns;

  void run(const Tensor& x, const Tensor& y, uint8_t fill) const {
    const auto out_height = std::ssize(rows), out_width = std::ssize(columns);
    const kernels::GatherPixelsArgs args{.x = static_cast<const uint8_t*>(x.const_data_ptr()),
                                         .y = static_cast<uint8_t*>(y.mutable_data_ptr()),
                                         .x_image_stride = height * width * channels,
                                         .x_row_stride = width * channels,
                                         .y_image_stride = out_height * out_width * channels,
                                         .y_row_stride = out_width * channels,
                                         .channels = channels,
                                         .out_height = out_height,
                                         .out_width = out_width,
                                         .row_from = rows.data(),
                                         .column_from = columns.data(),
                                         .fill = fill};
    at::parallel_for(0, batch * out_height, grain_of(kElementGrain, args.y_row_stride),
                     [&](int64_t begin, int64_t end) { kernels::gather_pixels(args, begin, end); });
  }
};

Tensor pad_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
               at::IntArrayRef pad, c10::string_view mode) {
  Tensor y = pad_meta(x, x_scale, x_zero_point, c10::fromIntArrayRefSlow(pad), mode);
  const Padding padding = check_mode(mode);
  const QParams qparams = read_qparams(kOp, "x_", x_scale, x_zero_point, check_codes(kOp, "x", x));
  const auto fill = static_cast<uint8_t>(qparams.zero_point);
  const auto sources = [&](const Tensor& from, int64_t d) {
    const auto i = static_cast<size_t>(2 * (from.dim() - 1 - d));
    const int64_t before = i < pad.size() ? pad[i] : 0, after = i < pad.size() ? pad[i + 1] : 0;
    return kernels::padded_sources(from.size(d), before, after, padding);
  };
  if (y.numel() == 0) return y;
  if (is_image(x, pad.size())) {
    const Padded padded{x.size(0), x.size(2), x.size(3), x.size(1), sources(x, 2), sources(x, 3)};
    padded.run(x.contiguous(at::MemoryFormat::ChannelsLast), y, fill);
    return y;
  }
  // Else one dimension after the other, each as the columns of images of one row.
  Tensor from = x.contiguous();
  for (int64_t d = x.dim() - static_cast<int64_t>(pad.size()) / 2; d < x.dim(); ++d) {
    at::DimVector sizes(from.sizes().begin(), from.sizes().end());
    const ChannelView view = channel_view(sizes, d, at::MemoryFormat::Contiguous);
    const Padded padded{view.outer, 1, view.channels, view.inner, {0}, sources(from, d)};
    sizes[d] = std::ssize(padded.columns);
    const Tensor to = d == x.dim() - 1 ? y : at::empty(sizes, x.options());
    padded.run(from, to, fill);
    from = to;
  }
  if (pad.empty()) y.copy_(from);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def("pad(Tensor x, Tensor x_scale, Tensor x_zero_point, SymInt[] pad, str mode) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("pad", pad_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("pad", pad_cpu); }

}  // namespace qtoolkit::ops
