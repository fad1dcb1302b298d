// Concatenation of tensors of codes, each with parameters of its own.
#include <torch/library.h>

#include "kernels/elementwise.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "cat";

int64_t check_dim(const Tensor& x, int64_t dim) {
  const int64_t rank = x.dim();
  TORCH_CHECK_VALUE(rank > 0 && dim >= -rank && dim < rank, "qtoolkit::cat: dim must lie in [",
                    -rank, ", ", rank - 1, "] for tensors like ", describe(x), ", got ", dim);
  return dim < 0 ? dim + rank : dim;
}

// The scales or zero points: a tensor for each input, or one that holds one element for each.
bool is_stacked(at::TensorList xs, at::TensorList scales, at::TensorList zero_points) {
  return xs.size() > 1 && scales.size() == 1 && zero_points.size() == 1;
}

Tensor cat_meta(at::TensorList xs, at::TensorList scales, at::TensorList zero_points, int64_t dim,
                const Tensor& y_scale, const Tensor& y_zero_point, int64_t quant_min,
                int64_t quant_max) {
  TORCH_CHECK_VALUE(!xs.empty(), "qtoolkit::cat: xs is empty; give at least one tensor");
  const bool stacked = is_stacked(xs, scales, zero_points);
  TORCH_CHECK_VALUE(stacked || (scales.size() == xs.size() && zero_points.size() == xs.size()),
                    "qtoolkit::cat: xs, scales and zero_points must be of one length, got ",
                    xs.size(), ", ", scales.size(), " and ", zero_points.size(),
                    "; or scales and zero_points one tensor each, with one element for each of xs");
  const Tensor& first = xs[0];
  if (stacked) {
    check_channel_qparams(kOp, scales[0], zero_points[0], first, static_cast<int64_t>(xs.size()),
                          "inputs");
  }
  dim = check_dim(first, dim);
  c10::SymDimVector sizes(first.sym_sizes().begin(), first.sym_sizes().end());
  sizes[dim] = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    check_codes(kOp, "xs", xs[i]);
    check_device(kOp, "xs", xs[i], first);
    if (!stacked) check_qparams(kOp, "", scales[i], zero_points[i], first);
    bool fits = xs[i].dim() == first.dim();
    for (int64_t d = 0; fits && d < first.dim(); ++d) {
      fits = d == dim || xs[i].sym_size(d) == first.sym_size(d);
    }
    TORCH_CHECK_VALUE(fits, "qtoolkit::cat: the tensors of xs must agree in all dimensions but ",
                      dim, ", got ", describe(first), " and ", describe(xs[i]));
    sizes[dim] += xs[i].sym_size(dim);
  }
  check_qparams(kOp, "y_", y_scale, y_zero_point, first);
  const CodeRange range = check_quant_range(kOp, quant_min, quant_max);
  return empty_beside(first, sizes, range.dtype(), first.suggest_memory_format());
}

Tensor cat_cpu(at::TensorList xs, at::TensorList scales, at::TensorList zero_points, int64_t dim,
               const Tensor& y_scale, const Tensor& y_zero_point, int64_t quant_min,
               int64_t quant_max) {
  Tensor y = cat_meta(xs, scales, zero_points, dim, y_scale, y_zero_point, quant_min, quant_max);
  const CodeRange range = check_quant_range(kOp, quant_min, quant_max);
  const QParams y_qparams = read_qparams(kOp, "y_", y_scale, y_zero_point, range);
  dim = check_dim(y, dim);
  const bool stacked = is_stacked(xs, scales, zero_points);
  const auto of_input = [&](at::TensorList list, size_t i) {
    return stacked ? list[0].select(0, static_cast<int64_t>(i)) : list[i];
  };
  const at::MemoryFormat format = xs[0].suggest_memory_format();
  // Each input fills a slice of every row of the output.
  const ChannelView view = channel_view(y.sizes(), dim, format);
  auto* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  for (size_t i = 0; i < xs.size(); ++i) {
    const CodeRange x_range = check_codes(kOp, "xs", xs[i]);
    const QParams qparams =
        read_qparams(kOp, "", of_input(scales, i), of_input(zero_points, i), x_range);
    const float factor = multiplier(kOp, qparams.scale, y_qparams.scale);
    const int64_t row = xs[i].size(dim) * view.inner;
    if (xs[i].numel() == 0) continue;
    const Tensor dense = xs[i].contiguous(format);
    const kernels::RequantizeArgs args{.x = static_cast<const uint8_t*>(dense.const_data_ptr()),
                                       .y = to,
                                       .channels = row,
                                       .x_row_stride = row,
                                       .y_row_stride = view.channels * view.inner,
                                       .x_signed = x_range.is_signed(),
                                       .x_zero_point = qparams.zero_point,
                                       .multiplier = &factor,
                                       .zero_point = y_qparams.zero_point,
                                       .lo = range.min,
                                       .hi = range.max};
    at::parallel_for(0, view.outer, grain_of(kElementGrain, row),
                     [&](int64_t begin, int64_t end) { kernels::requantize(args, begin, end); });
    to += row;
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "cat(Tensor[] xs, Tensor[] scales, Tensor[] zero_points, int dim, Tensor y_scale, "
      "Tensor y_zero_point, int quant_min, int quant_max) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("cat", cat_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("cat", cat_cpu); }

}  // namespace qtoolkit::ops
