// The straight-through gradient of fake-quantize: of x only, scale and zero_point get none. What is
// kept for it is a mask of one bit an element, not x.
#include <ATen/CachedTensorUtils.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "autograd/straight_through.h"
#include "ops/layout.h"

namespace qtoolkit::autograd {
namespace {

using OptionalInt = std::optional<int64_t>;

Tensor masked(const Tensor& grad, const Tensor& mask, int64_t layout) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, int64_t)>("qtoolkit::fake_quantize_mask_backward");
  return op.call(grad, mask, layout);
}

// The mask is constant almost everywhere: the gradient of the gradient passes it too.
struct MaskBackward : torch::autograd::Function<MaskBackward> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& mask,
                          int64_t layout) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save_mask(ctx, mask, layout);
    return masked(grad, mask, layout);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(ctx, grads[0]), {}, {}};
  }
};

struct FakeQuantize : torch::autograd::Function<FakeQuantize> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale,
                          const Variable& zero_point, OptionalInt ch_axis, OptionalInt group_size,
                          int64_t quant_min, int64_t quant_max, bool relu) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, OptionalInt,
                                        OptionalInt, int64_t, int64_t, bool)>(
            "qtoolkit::fake_quantize_mask");
    auto [y, mask] = op.call(x, scale, zero_point, ch_axis, group_size, quant_min, quant_max, relu);
    save_mask(ctx, mask, group_size ? 0 : ops::layout_of(x.suggest_memory_format()));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(ctx, grads[0]), {}, {}, {}, {}, {}, {}, {}};
  }
};

// An argument that gets no gradient must not make the result claim one.
Tensor constant(const Tensor& tensor) { return tensor.requires_grad() ? tensor.detach() : tensor; }

Tensor fake_quantize_per_tensor(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                int64_t quant_min, int64_t quant_max) {
  if (!needs_gradient(x)) {
    static const auto op =
        find<decltype(fake_quantize_per_tensor)>("qtoolkit::fake_quantize_per_tensor");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, scale, zero_point, quant_min, quant_max);
  }
  return FakeQuantize::apply(x, constant(scale), zero_point, OptionalInt(), OptionalInt(),
                             quant_min, quant_max, false);
}

Tensor fake_quantize_per_channel(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                 int64_t ch_axis, int64_t quant_min, int64_t quant_max) {
  if (!needs_gradient(x)) {
    static const auto op =
        find<decltype(fake_quantize_per_channel)>("qtoolkit::fake_quantize_per_channel");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, scale, zero_point, ch_axis, quant_min, quant_max);
  }
  return FakeQuantize::apply(x, constant(scale), zero_point, OptionalInt(ch_axis), OptionalInt(),
                             quant_min, quant_max, false);
}

Tensor fake_quantize_per_group(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                               int64_t group_size, int64_t quant_min, int64_t quant_max) {
  if (!needs_gradient(x)) {
    static const auto op =
        find<decltype(fake_quantize_per_group)>("qtoolkit::fake_quantize_per_group");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, scale, zero_point, group_size, quant_min, quant_max);
  }
  return FakeQuantize::apply(x, constant(scale), zero_point, OptionalInt(), OptionalInt(group_size),
                             quant_min, quant_max, false);
}

Tensor fake_quantize_relu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                          int64_t quant_min, int64_t quant_max) {
  if (!needs_gradient(x)) {
    static const auto op = find<decltype(fake_quantize_relu)>("qtoolkit::fake_quantize_relu");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, scale, zero_point, quant_min, quant_max);
  }
  return FakeQuantize::apply(x, constant(scale), zero_point, OptionalInt(), OptionalInt(),
                             quant_min, quant_max, true);
}

Tensor fake_quantize_mask_backward(const Tensor& grad, const Tensor& mask, int64_t layout) {
  if (!needs_gradient(grad)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return masked(grad, mask, layout);
  }
  return MaskBackward::apply(grad, mask, layout);
}

}  // namespace

// The rule by which PyTorch itself adds gradients in place (torch/csrc/autograd/input_buffer.cpp);
// besides, the memory is PyTorch's own (not numpy's, say) and holds the values as they are.
bool nobody_else_sees(const Tensor& grad) {
  return !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad) && !grad._is_zerotensor() &&
         !grad.is_neg() && !grad.is_nested() && grad.has_storage() &&
         at::caching::adjusted_use_count(grad) == 1 && grad.weak_use_count() == 1 &&
         grad.storage().use_count() == 1 && grad.storage().resizable();
}

void save_mask(AutogradContext* ctx, const Tensor& mask, int64_t layout) {
  ctx->save_for_backward({mask});
  ctx->saved_data["layout"] = layout;
}

Tensor apply_mask(AutogradContext* ctx, const Tensor& grad) {
  if (!grad.defined()) return {};
  const variable_list saved = ctx->get_saved_variables();
  const int64_t layout = ctx->saved_data["layout"].toInt();
  const auto format = ops::format_of("fake_quantize_mask_backward", layout, grad.dim());
  if (nobody_else_sees(grad) && grad.is_contiguous(format)) {
    static const auto op =
        find<void(const Tensor&, const Tensor&, int64_t)>("qtoolkit::fake_quantize_mask_backward_");
    op.call(grad, saved[0], layout);
    return grad;
  }
  return masked(grad, saved[0], layout);
}

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel);
  m.impl("fake_quantize_per_group", fake_quantize_per_group);
  m.impl("fake_quantize_relu", fake_quantize_relu);
  m.impl("fake_quantize_mask_backward", fake_quantize_mask_backward);
}

}  // namespace qtoolkit::autograd
