// Mean and sum of 8-bit codes over dimensions: average pooling with one window of all that is
// summed.
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/pooling.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

at::MemoryFormat format_of(const Tensor& x) {
  const bool last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Which dimensions are summed, and all of them in their order in memory.
struct Reduction {
  std::vector<bool> reduced;
  std::vector<int64_t> order;

  Reduction(const char* op, const Tensor& x, at::IntArrayRef dims)
      : reduced(static_cast<size_t>(x.dim()), false) {
    const int64_t rank = x.dim();
    TORCH_CHECK_VALUE(!dims.empty(), "qtoolkit::", op, ": dim names no dimension of x ",
                      describe(x));
    for (int64_t d : dims) {
      TORCH_CHECK_VALUE(d >= -rank && d < rank && !is_reduced(d < 0 ? d + rank : d),
                        "qtoolkit::", op, ": dim must hold different numbers in [", -rank, ", ",
                        rank - 1, "], got ", dims);
      reduced[static_cast<size_t>(d < 0 ? d + rank : d)] = true;
    }
    const bool last = format_of(x) == at::MemoryFormat::ChannelsLast;
    for (int64_t d = 0; d < rank; ++d) order.push_back(d);
    if (last) std::rotate(order.begin() + 1, order.begin() + 2, order.end());
  }

  bool is_reduced(int64_t d) const { return reduced[static_cast<size_t>(d)]; }
};

// The output, in the input's order of dimensions in memory.
Tensor allocate(const Tensor& x, const Reduction& reduction, bool keepdim, at::ScalarType dtype) {
  c10::SymDimVector sizes;
  std::vector<int64_t> place(reduction.order.size());
  for (int64_t d : reduction.order) {
    place[static_cast<size_t>(d)] = std::ssize(sizes);
    sizes.push_back(reduction.is_reduced(d) ? c10::SymInt(1) : x.sym_size(d));
  }
  Tensor y = empty_beside(x, sizes, dtype, at::MemoryFormat::Contiguous).permute(place);
  for (int64_t d = x.dim() - 1; d >= 0 && !keepdim; --d) {
    if (reduction.is_reduced(d)) y = y.squeeze(d);
  }
  return y;
}

Tensor reduce_meta(const char* op, const Tensor& x, const Tensor& x_scale,
                   const Tensor& x_zero_point, at::IntArrayRef dim, bool keepdim,
                   const Tensor& y_scale, const Tensor& y_zero_point, int64_t quant_min,
                   int64_t quant_max) {
  check_codes(op, "x", x);
  check_qparams(op, "x_", x_scale, x_zero_point, x);
  check_qparams(op, "y_", y_scale, y_zero_point, x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const Reduction reduction(op, x, dim);
  for (int64_t d = 0; d < x.dim(); ++d) {
    TORCH_CHECK_VALUE(!reduction.is_reduced(d) || x.sym_size(d) > 0, "qtoolkit::", op,
                      ": a dimension that is summed must not be empty, got x ", describe(x));
  }
  return allocate(x, reduction, keepdim, range.dtype());
}

// Sums over the middle of [outer, count, inner].
void reduce_into(const Tensor& y, const Tensor& x, int64_t count, int64_t inner, int64_t divisor,
                 kernels::AvgPool2dArgs args) {
  // Channels that a thread sums at once.
  constexpr int64_t kChannels = 64;
  const int64_t zero = 0, one = 1;
  args.out_height = args.out_width = 1;
  args.x_row_stride = inner;
  args.row_begin = args.column_begin = &zero;
  args.row_end = &count;
  args.column_end = args.column_divisor = &one;
  args.row_divisor = &divisor;
  const auto* from = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t blocks = (inner + kChannels - 1) / kChannels;
  const int64_t outer = x.numel() / (count * inner);
  at::parallel_for(0, outer * blocks, grain_of(kElementGrain, count * std::min(inner, kChannels)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t n = i / blocks, c = i % blocks * kChannels;
                       kernels::AvgPool2dArgs own = args;
                       own.x = from + n * count * inner + c;
                       own.y = to + n * inner + c;
                       own.channels = std::min(kChannels, inner - c);
                       kernels::avg_pool2d(own, 0, 1);
                     }
                   });
}

Tensor reduce_cpu(const char* op, bool divides, const Tensor& x, const Tensor& x_scale,
                  const Tensor& x_zero_point, at::IntArrayRef dim, bool keepdim,
                  const Tensor& y_scale, const Tensor& y_zero_point, int64_t quant_min,
                  int64_t quant_max) {
  Tensor y = reduce_meta(op, x, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point,
                         quant_min, quant_max);
  const CodeRange x_range = check_codes(op, "x", x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const QParams x_qparams = read_qparams(op, "x_", x_scale, x_zero_point, x_range);
  const QParams y_qparams = read_qparams(op, "y_", y_scale, y_zero_point, range);
  // Checks that the quotient fits float32; the kernel divides it further.
  multiplier(op, x_qparams.scale, y_qparams.scale);
  const Reduction reduction(op, x, dim);
  int64_t count = 1, inner = 1;
  std::vector<int64_t> kept, summed;
  bool together = true;  // in memory
  for (int64_t d : reduction.order) {
    if (reduction.is_reduced(d)) {
      together = together && (summed.empty() || inner == 1);
      count *= x.size(d);
      summed.push_back(d);
    } else {
      if (!summed.empty()) inner *= x.size(d);
      kept.push_back(d);
    }
  }
  TORCH_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max() / 255, "qtoolkit::", op, ": ",
                    count, " codes could overflow the int32 sum");
  if (y.numel() == 0) return y;
  Tensor dense = x.contiguous(format_of(x));
  if (!together) {
    std::vector<int64_t> order = kept;
    order.insert(order.end(), summed.begin(), summed.end());
    dense = dense.permute(order).contiguous();
    inner = 1;
  }
  reduce_into(y, dense, count, inner, divides ? count : 1,
              {.x_signed = x_range.is_signed(),
               .multiplier = static_cast<double>(x_qparams.scale) / y_qparams.scale,
               .x_zero_point = x_qparams.zero_point,
               .zero_point = y_qparams.zero_point,
               .lo = range.min,
               .hi = range.max});
  return y;
}

Tensor mean_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                 at::IntArrayRef dim, bool keepdim, const Tensor& y_scale,
                 const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  return reduce_meta("mean", x, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point,
                     quant_min, quant_max);
}

Tensor mean_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                at::IntArrayRef dim, bool keepdim, const Tensor& y_scale,
                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  return reduce_cpu("mean", true, x, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point,
                    quant_min, quant_max);
}

Tensor sum_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                at::IntArrayRef dim, bool keepdim, const Tensor& y_scale,
                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  return reduce_meta("sum", x, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point,
                     quant_min, quant_max);
}

Tensor sum_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
               at::IntArrayRef dim, bool keepdim, const Tensor& y_scale, const Tensor& y_zero_point,
               int64_t quant_min, int64_t quant_max) {
  return reduce_cpu("sum", false, x, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point,
                    quant_min, quant_max);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "mean(Tensor x, Tensor x_scale, Tensor x_zero_point, int[] dim, bool keepdim, "
      "Tensor y_scale, Tensor y_zero_point, int quant_min, int quant_max) -> Tensor",
      tags);
  m.def(
      "sum(Tensor x, Tensor x_scale, Tensor x_zero_point, int[] dim, bool keepdim, "
      "Tensor y_scale, Tensor y_zero_point, int quant_min, int quant_max) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("mean", mean_meta);
  m.impl("sum", sum_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("mean", mean_cpu);
  m.impl("sum", sum_cpu);
}

}  // namespace qtoolkit::ops
