// The gradients of fake-quantize with learned parameters. Rounding is straight-through, so a second
// derivative would say nothing of the function: the backward operators' backward is an error.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "autograd/straight_through.h"

namespace qtoolkit::autograd {
namespace {

using OptionalTensor = std::optional<Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;

using Lsq = Tensor(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                   std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max,
                   double grad_scale);
using LsqBackward = TensorTriple(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                 const OptionalTensor& zero_point, std::optional<int64_t> ch_axis,
                                 int64_t quant_min, int64_t quant_max, double grad_scale);
using LsqBackwardInPlace = TensorPair(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                      const OptionalTensor& zero_point,
                                      std::optional<int64_t> ch_axis, int64_t quant_min,
                                      int64_t quant_max, double grad_scale);
using Pact = Tensor(const Tensor& x, const Tensor& alpha, int64_t quant_max);
using PactBackward = TensorPair(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                int64_t quant_max);
using PactBackwardInPlace = Tensor(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                   int64_t quant_max);

// Whether the gradient of x may take the place of grad.
bool may_overwrite(const Tensor& grad, const Tensor& x) {
  return nobody_else_sees(grad) && grad.scalar_type() == x.scalar_type() &&
         grad.is_contiguous(x.suggest_memory_format());
}

[[noreturn]] void no_second_derivative(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "qtoolkit::", op,
                              ": second derivatives of a straight-through gradient make no sense; "
                              "do not differentiate this gradient (create_graph=True)");
}

// --- LSQ

struct LsqFunction : torch::autograd::Function<LsqFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale,
                          const OptionalTensor& zero_point, std::optional<int64_t> ch_axis,
                          int64_t quant_min, int64_t quant_max, double grad_scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale, zero_point.value_or(Tensor())});
    if (ch_axis) ctx->saved_data["ch_axis"] = *ch_axis;
    ctx->saved_data["quant_min"] = quant_min;
    ctx->saved_data["quant_max"] = quant_max;
    ctx->saved_data["grad_scale"] = grad_scale;
    static const auto op = find<Lsq>("qtoolkit::fake_quantize_lsq");
    return op.call(x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(7);
    const variable_list saved = ctx->get_saved_variables();
    const auto& x = saved[0];
    const OptionalTensor zero_point = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const auto found = ctx->saved_data.find("ch_axis");
    const auto ch_axis = found == ctx->saved_data.end() ? std::optional<int64_t>()
                                                        : std::optional(found->second.toInt());
    const int64_t quant_min = ctx->saved_data["quant_min"].toInt();
    const int64_t quant_max = ctx->saved_data["quant_max"].toInt();
    const double factor = ctx->saved_data["grad_scale"].toDouble();
    Tensor grad_x, grad_scale, grad_zero_point;
    if (may_overwrite(grads[0], x)) {
      static const auto op = find<LsqBackwardInPlace>("qtoolkit::fake_quantize_lsq_backward_");
      std::tie(grad_scale, grad_zero_point) =
          op.call(grads[0], x, saved[1], zero_point, ch_axis, quant_min, quant_max, factor);
      grad_x = grads[0];
    } else {
      static const auto op = find<LsqBackward>("qtoolkit::fake_quantize_lsq_backward");
      std::tie(grad_x, grad_scale, grad_zero_point) =
          op.call(grads[0], x, saved[1], zero_point, ch_axis, quant_min, quant_max, factor);
    }
    return {grad_x, grad_scale, zero_point ? grad_zero_point : Tensor(), {}, {}, {}, {}};
  }
};

struct LsqBackwardFunction : torch::autograd::Function<LsqBackwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* /*ctx*/, const Variable& grad, const Variable& x,
                               const Variable& scale, const OptionalTensor& zero_point,
                               std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max,
                               double grad_scale) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find<LsqBackward>("qtoolkit::fake_quantize_lsq_backward");
    const auto [grad_x, grad_of_scale, grad_of_zero_point] =
        op.call(grad, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
    return {grad_x, grad_of_scale, grad_of_zero_point};
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    no_second_derivative("fake_quantize_lsq_backward");
  }
};

Tensor fake_quantize_lsq(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                         std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max,
                         double grad_scale) {
  return LsqFunction::apply(x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
}

TensorTriple fake_quantize_lsq_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                        const OptionalTensor& zero_point,
                                        std::optional<int64_t> ch_axis, int64_t quant_min,
                                        int64_t quant_max, double grad_scale) {
  const variable_list results = LsqBackwardFunction::apply(grad, x, scale, zero_point, ch_axis,
                                                           quant_min, quant_max, grad_scale);
  return {results[0], results[1], results[2]};
}

// --- PACT

struct PactFunction : torch::autograd::Function<PactFunction> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& alpha,
                          int64_t quant_max) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, alpha});
    ctx->saved_data["quant_max"] = quant_max;
    static const auto op = find<Pact>("qtoolkit::fake_quantize_pact");
    return op.call(x, alpha, quant_max);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(3);
    const variable_list saved = ctx->get_saved_variables();
    const int64_t quant_max = ctx->saved_data["quant_max"].toInt();
    if (may_overwrite(grads[0], saved[0])) {
      static const auto op = find<PactBackwardInPlace>("qtoolkit::fake_quantize_pact_backward_");
      const Tensor grad_alpha = op.call(grads[0], saved[0], saved[1], quant_max);
      return {grads[0], grad_alpha, {}};
    }
    static const auto op = find<PactBackward>("qtoolkit::fake_quantize_pact_backward");
    const auto [grad_x, grad_alpha] = op.call(grads[0], saved[0], saved[1], quant_max);
    return {grad_x, grad_alpha, {}};
  }
};

struct PactBackwardFunction : torch::autograd::Function<PactBackwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* /*ctx*/, const Variable& grad, const Variable& x,
                               const Variable& alpha, int64_t quant_max) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find<PactBackward>("qtoolkit::fake_quantize_pact_backward");
    const auto [grad_x, grad_alpha] = op.call(grad, x, alpha, quant_max);
    return {grad_x, grad_alpha};
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    no_second_derivative("fake_quantize_pact_backward");
  }
};

Tensor fake_quantize_pact(const Tensor& x, const Tensor& alpha, int64_t quant_max) {
  return PactFunction::apply(x, alpha, quant_max);
}

TensorPair fake_quantize_pact_backward(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                       int64_t quant_max) {
  const variable_list results = PactBackwardFunction::apply(grad, x, alpha, quant_max);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  m.impl("fake_quantize_lsq", fake_quantize_lsq);
  m.impl("fake_quantize_lsq_backward", fake_quantize_lsq_backward);
  m.impl("fake_quantize_pact", fake_quantize_pact);
  m.impl("fake_quantize_pact_backward", fake_quantize_pact_backward);
}

}  // namespace qtoolkit::autograd
