// The convolution of quantization-aware training: torch's, on fake-quantized floats. Its autograd
// side (autograd/conv2d_train.cpp) keeps codes for the backward instead of floats.
#include <ATen/ops/conv2d.h>
#include <torch/library.h>

#include "ops/exact_codes.h"

namespace qtoolkit::ops {
namespace {

Tensor conv2d_train(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                    c10::SymIntArrayRef dilation, c10::SymInt groups, const OptionalTensor& x_scale,
                    const OptionalTensor& x_zero_point, int64_t x_quant_min, int64_t x_quant_max,
                    const OptionalTensor& weight_scale, int64_t weight_quant_max) {
  check_code_arguments(x, x_scale, x_zero_point, x_quant_min, x_quant_max, weight, weight_scale,
                       weight_quant_max);
  return at::conv2d_symint(x, weight, bias, stride, padding, dilation, groups);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "conv2d_train(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups, Tensor? x_scale, Tensor? x_zero_point, int x_quant_min, "
      "int x_quant_max, Tensor? weight_scale, int weight_quant_max) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, CompositeExplicitAutograd, m) { m.impl("conv2d_train", conv2d_train); }

}  // namespace qtoolkit::ops
