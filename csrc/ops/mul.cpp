// Multiplication of two tensors of codes.
#include <torch/library.h>

#include "kernels/elementwise.h"
#include "ops/binary.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "mul";

Tensor mul_meta(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point, const Tensor& b,
                const Tensor& b_scale, const Tensor& b_zero_point, const Tensor& y_scale,
                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max, bool relu) {
  return binary_meta(kOp, {a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale,
                           y_zero_point, quant_min, quant_max, relu});
}

Tensor mul_cpu(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point, const Tensor& b,
               const Tensor& b_scale, const Tensor& b_zero_point, const Tensor& y_scale,
               const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max, bool relu) {
  const BinaryArguments given{a,       a_scale,      a_zero_point, b,         b_scale, b_zero_point,
                              y_scale, y_zero_point, quant_min,    quant_max, relu};
  Tensor y = binary_meta(kOp, given);
  const BinaryQParams qparams = read_binary_qparams(kOp, given);
  const double product = static_cast<double>(qparams.a.scale) * qparams.b.scale;
  const float factor = multiplier(kOp, product, qparams.y.scale, "a_scale * b_scale / y_scale");
  run_binary<kernels::MulArgs>(
      given, qparams, y, kernels::mul,
      [&](kernels::MulArgs& args, bool /*swapped*/) { args.multiplier = factor; });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "mul(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, "
      "Tensor b_zero_point, Tensor y_scale, Tensor y_zero_point, int quant_min, int quant_max, "
      "bool relu) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("mul", mul_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("mul", mul_cpu); }

}  // namespace qtoolkit::ops
