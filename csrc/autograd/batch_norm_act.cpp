// The gradient of the fused training batch norm: of x, weight, bias and residual. For the backward
// x, the weight, mean, invstd and the mask of one bit an element are kept.
#include "ops/batch_norm_act.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>

#include "autograd/straight_through.h"

namespace qtoolkit::autograd {
namespace {

using ops::BatchNormGradients;
using ops::OptionalTensor;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

using Forward = Outputs(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& residual, bool training, double momentum, double eps,
                        bool relu, std::optional<double> upper, const OptionalTensor& min_val,
                        const OptionalTensor& max_val, const OptionalTensor& scale,
                        const OptionalTensor& zero_point, double averaging_constant, bool symmetric,
                        int64_t quant_min, int64_t quant_max);
using Backward = BatchNormGradients(const Tensor& grad, const Tensor& x,
                                    const OptionalTensor& weight, const Tensor& mean,
                                    const Tensor& invstd, const Tensor& mask, bool training,
                                    std::array<bool, 4> output_mask);

template <class... Args>
Outputs call_forward(const Args&... args) {
  static const auto op = find<Forward>("qtoolkit::batch_norm_act");
  return op.call(args...);
}

template <class... Args>
BatchNormGradients call_backward(const Args&... args) {
  static const auto op = find<Backward>("qtoolkit::batch_norm_act_backward");
  return op.call(args...);
}

// What autograd saved of a tensor that changes in place must be noticed.
void note_change(const OptionalTensor& tensor) {
  if (tensor && !tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
}

// Whether the gradient of x may take the place of grad.
bool may_overwrite(const Tensor& grad, const Tensor& x) {
  return nobody_else_sees(grad) && grad.device().is_cpu() && grad.scalar_type() == at::kFloat &&
         x.device().is_cpu() && !at::isTensorSubclassLike(x) &&
         grad.is_contiguous(x.suggest_memory_format());
}

constexpr size_t kInputs = 19;

struct BatchNormAct : torch::autograd::Function<BatchNormAct> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& residual,
                               bool training, double momentum, double eps, bool relu,
                               std::optional<double> upper, const OptionalTensor& min_val,
                               const OptionalTensor& max_val, const OptionalTensor& scale,
                               const OptionalTensor& zero_point, double averaging_constant,
                               bool symmetric, int64_t quant_min, int64_t quant_max) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, mean, invstd, mask] = call_forward(
        x, weight, bias, running_mean, running_var, residual, training, momentum, eps, relu, upper,
        min_val, max_val, scale, zero_point, averaging_constant, symmetric, quant_min, quant_max);
    if (training) {
      note_change(running_mean);
      note_change(running_var);
    }
    if (averaging_constant > 0) {
      for (const OptionalTensor* state : {&min_val, &max_val, &scale, &zero_point}) {
        note_change(*state);
      }
    }
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({mean, invstd, mask});
    ctx->save_for_backward({x, weight.value_or(Tensor()), mean, invstd, mask});
    ctx->saved_data["training"] = training;
    ctx->saved_data["weight"] = weight && weight->defined();
    ctx->saved_data["bias"] = bias && bias->defined();
    ctx->saved_data["running"] = running_mean && running_mean->defined();
    ctx->saved_data["residual"] = residual && residual->defined();
    return {y, mean, invstd, mask};
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    variable_list result(kInputs);
    Tensor grad = std::move(grads[0]);
    if (!grad.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &mean = saved[2], &invstd = saved[3], &mask = saved[4];
    const OptionalTensor weight = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const bool training = given(ctx, "training");
    // Edges are counted over the tensors that were given.
    size_t edge = 0;
    const auto wanted = [&](bool is_given) { return is_given && ctx->needs_input_grad(edge++); };
    std::array<bool, 4> output_mask = {};
    output_mask[0] = wanted(true);
    output_mask[1] = wanted(given(ctx, "weight"));
    output_mask[2] = wanted(given(ctx, "bias"));
    if (given(ctx, "running")) edge += 2;
    const bool residual = wanted(given(ctx, "residual"));
    // Without a mask the residual's gradient is the result's.
    const bool unmasked = mask.sym_numel() == 0;
    output_mask[3] = residual && !unmasked;
    if (residual && unmasked) result[5] = grad;
    const auto [grad_x, grad_weight, grad_bias, grad_residual] =
        may_overwrite(grad, x)
            ? ops::batch_norm_act_backward(grad, x, weight, mean, invstd, mask, training,
                                           output_mask, true)
            : call_backward(grad, x, weight, mean, invstd, mask, training, output_mask);
    if (output_mask[0]) result[0] = grad_x;
    if (output_mask[1]) result[1] = grad_weight;
    if (output_mask[2]) result[2] = grad_bias;
    if (output_mask[3]) result[5] = grad_residual;
    return result;
  }

 private:
  static bool given(AutogradContext* ctx, const char* name) {
    return ctx->saved_data[name].toBool();
  }
};

struct BatchNormActBackward : torch::autograd::Function<BatchNormActBackward> {
  static variable_list forward(AutogradContext* /*ctx*/, const Tensor& grad, const Tensor& x,
                               const OptionalTensor& weight, const Tensor& mean,
                               const Tensor& invstd, const Tensor& mask, bool training,
                               std::array<bool, 4> output_mask) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [grad_x, grad_weight, grad_bias, grad_residual] =
        call_backward(grad, x, weight, mean, invstd, mask, training, output_mask);
    return {grad_x, grad_weight, grad_bias, grad_residual};
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "qtoolkit::batch_norm_act cannot be differentiated twice; use torch.nn.BatchNorm2d in a "
        "model without fake-quantize for second derivatives");
  }
};

void check_state(const char* name, const OptionalTensor& tensor) {
  TORCH_CHECK_VALUE(
      !(tensor && tensor->defined() && tensor->requires_grad()), "qtoolkit::batch_norm_act: ", name,
      " is changed in place and must not require a gradient; pass ", name, ".detach()");
}

Outputs batch_norm_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& running_mean, const OptionalTensor& running_var,
                       const OptionalTensor& residual, bool training, double momentum, double eps,
                       bool relu, std::optional<double> upper, const OptionalTensor& min_val,
                       const OptionalTensor& max_val, const OptionalTensor& scale,
                       const OptionalTensor& zero_point, double averaging_constant, bool symmetric,
                       int64_t quant_min, int64_t quant_max) {
  check_state("running_mean", running_mean);
  check_state("running_var", running_var);
  check_state("min_val", min_val);
  check_state("max_val", max_val);
  check_state("scale", scale);
  const variable_list r = BatchNormAct::apply(
      x, weight, bias, running_mean, running_var, residual, training, momentum, eps, relu, upper,
      min_val, max_val, scale, zero_point, averaging_constant, symmetric, quant_min, quant_max);
  return {r[0], r[1], r[2], r[3]};
}

BatchNormGradients batch_norm_act_backward(const Tensor& grad, const Tensor& x,
                                           const OptionalTensor& weight, const Tensor& mean,
                                           const Tensor& invstd, const Tensor& mask, bool training,
                                           std::array<bool, 4> output_mask) {
  const variable_list r =
      BatchNormActBackward::apply(grad, x, weight, mean, invstd, mask, training, output_mask);
  return {r[0], r[1], r[2], r[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  m.impl("batch_norm_act", batch_norm_act);
  m.impl("batch_norm_act_backward", batch_norm_act_backward);
}

}  // namespace qtoolkit::autograd
