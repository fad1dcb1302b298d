// Addition of two tensors of codes.
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/elementwise.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "add";

c10::SymDimVector broadcast_sizes(const Tensor& a, const Tensor& b) {
  const auto one_or_equal = [](const c10::SymInt& m, const c10::SymInt& n) {
    return m == n || m == 1 || n == 1;
  };
  for (int64_t d = 1; d <= std::min(a.dim(), b.dim()); ++d) {
    TORCH_CHECK_VALUE(one_or_equal(a.sym_size(-d), b.sym_size(-d)),
                      "qtoolkit::add: the shapes of a ", describe(a), " and b ", describe(b),
                      " do not broadcast to one");
  }
  return at::infer_size_symdimvector(a.sym_sizes(), b.sym_sizes());
}

// The layout of an operand that already has the output's shape.
at::MemoryFormat output_format(const Tensor& a, const Tensor& b, c10::SymIntArrayRef sizes) {
  if (a.sym_sizes() == sizes) return a.suggest_memory_format();
  if (b.sym_sizes() == sizes) return b.suggest_memory_format();
  return at::MemoryFormat::Contiguous;
}

Tensor add_meta(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point, const Tensor& b,
                const Tensor& b_scale, const Tensor& b_zero_point, const Tensor& y_scale,
                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max, bool /*relu*/) {
  check_codes(kOp, "a", a);
  check_codes(kOp, "b", b);
  check_device(kOp, "b", b, a);
  check_qparams(kOp, "a_", a_scale, a_zero_point, a);
  check_qparams(kOp, "b_", b_scale, b_zero_point, a);
  check_qparams(kOp, "y_", y_scale, y_zero_point, a);
  const CodeRange range = check_quant_range(kOp, quant_min, quant_max);
  const c10::SymDimVector sizes = broadcast_sizes(a, b);
  return empty_beside(a, sizes, range.dtype(), output_format(a, b, sizes));
}

// An operand in the output's shape and layout.
Tensor spread(const Tensor& operand, const Tensor& y, at::MemoryFormat format) {
  return (operand.sizes() == y.sizes() ? operand : operand.expand(y.sizes())).contiguous(format);
}

Tensor add_cpu(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point, const Tensor& b,
               const Tensor& b_scale, const Tensor& b_zero_point, const Tensor& y_scale,
               const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max, bool relu) {
  Tensor y = add_meta(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point,
                      quant_min, quant_max, relu);
  const CodeRange range = check_quant_range(kOp, quant_min, quant_max);
  const CodeRange a_range = check_codes(kOp, "a", a);
  const CodeRange b_range = check_codes(kOp, "b", b);
  const QParams a_qparams = read_qparams(kOp, "a_", a_scale, a_zero_point, a_range);
  const QParams b_qparams = read_qparams(kOp, "b_", b_scale, b_zero_point, b_range);
  const QParams y_qparams = read_qparams(kOp, "y_", y_scale, y_zero_point, range);
  const at::MemoryFormat format = output_format(a, b, y.sym_sizes());
  const Tensor dense_a = spread(a, y, format);
  const Tensor dense_b = spread(b, y, format);
  const kernels::AddArgs args{.a = static_cast<const uint8_t*>(dense_a.const_data_ptr()),
                              .b = static_cast<const uint8_t*>(dense_b.const_data_ptr()),
                              .y = static_cast<uint8_t*>(y.mutable_data_ptr()),
                              .a_signed = a_range.is_signed(),
                              .b_signed = b_range.is_signed(),
                              .a_zero_point = a_qparams.zero_point,
                              .b_zero_point = b_qparams.zero_point,
                              .a_multiplier = multiplier(kOp, a_qparams.scale, y_qparams.scale),
                              .b_multiplier = multiplier(kOp, b_qparams.scale, y_qparams.scale),
                              .zero_point = y_qparams.zero_point,
                              .lo = relu_bound(range, y_qparams.zero_point, relu),
                              .hi = range.max};
  at::parallel_for(0, y.numel(), kElementGrain,
                   [&](int64_t begin, int64_t end) { kernels::add(args, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "add(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, "
      "Tensor b_zero_point, Tensor y_scale, Tensor y_zero_point, int quant_min, int quant_max, "
      "bool relu) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("add", add_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("add", add_cpu); }

}  // namespace qtoolkit::ops
