// Gradients of conv2d_train. Where x and weight hold nothing but fake-quantized values, their codes
// are kept, a quarter of the memory; the backward dequantizes them to the same bits.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/library.h>

#include <optional>

#include "autograd/straight_through.h"
#include "ops/exact_codes.h"

namespace qtoolkit::autograd {
namespace {

using ops::CodeRange;
using OptionalTensor = std::optional<Tensor>;

using Conv2dTrain = Tensor(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                           c10::SymIntArrayRef dilation, c10::SymInt groups,
                           const OptionalTensor& x_scale, const OptionalTensor& x_zero_point,
                           int64_t x_quant_min, int64_t x_quant_max,
                           const OptionalTensor& weight_scale, int64_t weight_quant_max);

// A tensor as it is kept: its codes with scale and zero point, or itself.
struct Kept {
  Tensor values, scale, zero_point;
};

// Whether the memory of a tensor can be read here: not where it is traced, wrapped or lazily
// negated.
bool has_values(const Tensor& tensor) {
  return tensor.device().is_cpu() && tensor.layout() == at::kStrided &&
         !at::isTensorSubclassLike(tensor) && !tensor.is_neg() && !tensor._is_zerotensor() &&
         !tensor.key_set().has(c10::DispatchKey::Functionalize);
}

bool can_encode(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& zero_point) {
  return scale && scale->defined() && x.scalar_type() == at::kFloat && has_values(x) &&
         has_values(*scale) && (!zero_point || has_values(*zero_point));
}

Kept keep(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& zero_point,
          CodeRange range) {
  if (can_encode(x, scale, zero_point)) {
    const Tensor zeros = zero_point ? *zero_point : at::zeros_like(*scale, at::kInt);
    const OptionalTensor codes = ops::exact_codes(x, *scale, zeros, range);
    // Copies: an observer changes its buffers in place at the next step.
    if (codes) return {*codes, scale->clone(), zeros.clone()};
  }
  return {x, {}, {}};
}

Tensor restore(const Tensor& values, const Tensor& scale, const Tensor& zero_point) {
  return scale.defined() ? ops::from_exact_codes(values, scale, zero_point) : values;
}

struct Conv2dTrainFunction : torch::autograd::Function<Conv2dTrainFunction> {
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& weight,
                          const OptionalTensor& bias, c10::SymIntArrayRef stride,
                          c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                          const c10::SymInt& groups, const OptionalTensor& x_scale,
                          const OptionalTensor& x_zero_point, CodeRange x_range,
                          const OptionalTensor& weight_scale, CodeRange weight_range) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find<Conv2dTrain>("qtoolkit::conv2d_train");
    const Kept kept_x = keep(x, x_scale, x_zero_point, x_range);
    const Kept kept_weight = keep(weight, weight_scale, std::nullopt, weight_range);
    ctx->save_for_backward({kept_x.values, kept_x.scale, kept_x.zero_point, kept_weight.values,
                            kept_weight.scale, kept_weight.zero_point});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["bias"] = bias.has_value() && bias->defined();
    return op.call(x, weight, bias, stride, padding, dilation, groups, x_scale, x_zero_point,
                   x_range.min, x_range.max, weight_scale, weight_range.max);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(12);
    if (!grads[0].defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "qtoolkit::conv2d_train has no second derivatives, as it keeps codes for its "
                "backward; set keep_codes = False on the convolution (qtoolkit.nn.qat.Conv2d)");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor x = restore(saved[0], saved[1], saved[2]);
    const Tensor weight = restore(saved[3], saved[4], saved[5]);
    const bool has_bias = ctx->saved_data["bias"].toBool();
    const std::vector<c10::SymInt> no_output_padding(2, 0);
    const std::vector<c10::SymInt> bias_sizes = {weight.sym_size(0)};
    const auto [grad_x, grad_weight, grad_bias] = at::convolution_backward_symint(
        grads[0], x, weight,
        has_bias ? at::OptionalSymIntArrayRef(bias_sizes) : at::OptionalSymIntArrayRef(),
        ctx->saved_data["stride"].toSymIntVector(), ctx->saved_data["padding"].toSymIntVector(),
        ctx->saved_data["dilation"].toSymIntVector(), false, no_output_padding,
        ctx->saved_data["groups"].toSymInt(),
        {ctx->needs_input_grad(0), ctx->needs_input_grad(1), has_bias && ctx->needs_input_grad(2)});
    result[0] = grad_x;
    result[1] = grad_weight;
    result[2] = grad_bias;
    return result;
  }
};

OptionalTensor constant(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad() ? OptionalTensor(tensor->detach()) : tensor;
}

Tensor conv2d_train(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                    c10::SymIntArrayRef dilation, c10::SymInt groups, const OptionalTensor& x_scale,
                    const OptionalTensor& x_zero_point, int64_t x_quant_min, int64_t x_quant_max,
                    const OptionalTensor& weight_scale, int64_t weight_quant_max) {
  constexpr const char* op = "conv2d_train";
  ops::check_code_arguments(x, x_scale, x_zero_point, x_quant_min, x_quant_max, weight,
                            weight_scale, weight_quant_max);
  return Conv2dTrainFunction::apply(
      x, weight, bias, stride, padding, dilation, groups, constant(x_scale), x_zero_point,
      ops::check_quant_range(op, x_quant_min, x_quant_max), constant(weight_scale),
      ops::check_quant_range(op, -weight_quant_max, weight_quant_max));
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) { m.impl("conv2d_train", conv2d_train); }

}  // namespace qtoolkit::autograd
