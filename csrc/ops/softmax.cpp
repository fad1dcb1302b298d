// Softmax of 8-bit codes, with a result of codes or float32.
#include "kernels/softmax.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/conv_args.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "softmax";

// The softmax dimension is the last one in memory: of channels_last images their channels, else the
// tensor is turned for it.
bool is_channels(const Tensor& x, int64_t dim) {
  return x.dim() == 4 && dim == 1 && x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

int64_t check_dim(const Tensor& x, int64_t dim) {
  const int64_t rank = x.dim();
  TORCH_CHECK_VALUE(rank > 0 && dim >= -rank && dim < rank, "qtoolkit::softmax: dim must lie in [",
                    -rank, ", ", rank - 1, "] for x ", describe(x), ", got ", dim);
  return dim < 0 ? dim + rank : dim;
}

Tensor softmax_meta(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, int64_t dim,
                    const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                    int64_t quant_min, int64_t quant_max) {
  check_codes(kOp, "x", x);
  check_qparams(kOp, "x_", x_scale, x_zero_point, x);
  const at::ScalarType dtype =
      check_output_qparams(kOp, y_scale, y_zero_point, quant_min, quant_max, x);
  dim = check_dim(x, dim);
  if (is_channels(x, dim)) {
    return empty_beside(x, x.sym_sizes(), dtype, at::MemoryFormat::ChannelsLast);
  }
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  std::swap(sizes[dim], sizes.back());
  return empty_beside(x, sizes, dtype, at::MemoryFormat::Contiguous).transpose(dim, -1);
}

Tensor softmax_cpu(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point, int64_t dim,
                   const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                   int64_t quant_min, int64_t quant_max) {
  Tensor y =
      softmax_meta(x, x_scale, x_zero_point, dim, y_scale, y_zero_point, quant_min, quant_max);
  dim = check_dim(x, dim);
  const CodeRange x_range = check_codes(kOp, "x", x);
  const QParams x_qparams = read_qparams(kOp, "x_", x_scale, x_zero_point, x_range);
  kernels::SoftmaxArgs args;
  if (y_scale) {
    const CodeRange range = check_quant_range(kOp, quant_min, quant_max);
    const QParams y_qparams = read_qparams(kOp, "y_", *y_scale, *y_zero_point, range);
    args.y = static_cast<uint8_t*>(y.mutable_data_ptr());
    args.y_scale = y_qparams.scale;
    args.zero_point = y_qparams.zero_point;
    args.lo = range.min;
    args.hi = range.max;
  } else {
    args.y_float = y.mutable_data_ptr<float>();
  }
  if (y.numel() == 0) return y;
  const Tensor dense = is_channels(x, dim) ? x.contiguous(at::MemoryFormat::ChannelsLast)
                                           : x.transpose(dim, -1).contiguous();
  args.x = static_cast<const uint8_t*>(dense.const_data_ptr());
  args.is_signed = x_range.is_signed();
  args.length = args.x_row_stride = args.y_row_stride = x.size(dim);
  args.table = kernels::softmax_table(x_qparams.scale);
  at::parallel_for(0, x.numel() / args.length, grain_of(kElementGrain, args.length),
                   [&](int64_t begin, int64_t end) { kernels::softmax(args, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "softmax(Tensor x, Tensor x_scale, Tensor x_zero_point, int dim, Tensor? y_scale, "
      "Tensor? y_zero_point, int quant_min, int quant_max) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("softmax", softmax_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("softmax", softmax_cpu); }

}  // namespace qtoolkit::ops
