// The straight-through gradient of fake-quantize: of x only, scale and zero_point get none. The
// backward operators are linear in grad, so they are differentiable with respect to grad by
// themselves.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace qtoolkit::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using PerTensor = Tensor(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                         int64_t quant_min, int64_t quant_max);
using PerTensorBackward = Tensor(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                 const Tensor& zero_point, int64_t quant_min, int64_t quant_max);
using PerChannel = Tensor(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                          int64_t ch_axis, int64_t quant_min, int64_t quant_max);
using PerChannelBackward = Tensor(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                  const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                                  int64_t quant_max);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class... Args>
Tensor forward_operator(const Tensor& x, const Args&... args) {
  if constexpr (sizeof...(Args) == 4) {
    static const auto op = find<PerTensor>("qtoolkit::fake_quantize_per_tensor");
    return op.call(x, args...);
  } else {
    static const auto op = find<PerChannel>("qtoolkit::fake_quantize_per_channel");
    return op.call(x, args...);
  }
}

template <class... Args>
Tensor backward_operator(const Tensor& grad, const Tensor& x, const Args&... args) {
  if constexpr (sizeof...(Args) == 4) {
    static const auto op = find<PerTensorBackward>("qtoolkit::fake_quantize_per_tensor_backward");
    return op.call(grad, x, args...);
  } else {
    static const auto op = find<PerChannelBackward>("qtoolkit::fake_quantize_per_channel_backward");
    return op.call(grad, x, args...);
  }
}

// What both Functions save, and how their backward applies the range mask to a gradient. `axis` is
// empty for per tensor.
void save(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
          std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max) {
  ctx->save_for_backward({x, scale, zero_point});
  if (ch_axis) ctx->saved_data["ch_axis"] = *ch_axis;
  ctx->saved_data["quant_min"] = quant_min;
  ctx->saved_data["quant_max"] = quant_max;
}

Tensor apply_mask(AutogradContext* ctx, const Tensor& grad) {
  if (!grad.defined()) return {};
  const variable_list saved = ctx->get_saved_variables();
  const int64_t quant_min = ctx->saved_data["quant_min"].toInt();
  const int64_t quant_max = ctx->saved_data["quant_max"].toInt();
  const auto ch_axis = ctx->saved_data.find("ch_axis");
  if (ch_axis == ctx->saved_data.end()) {
    return backward_operator(grad, saved[0], saved[1], saved[2], quant_min, quant_max);
  }
  return backward_operator(grad, saved[0], saved[1], saved[2], ch_axis->second.toInt(), quant_min,
                           quant_max);
}

struct FakeQuantize : torch::autograd::Function<FakeQuantize> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& scale,
                          const Variable& zero_point, std::optional<int64_t> ch_axis,
                          int64_t quant_min, int64_t quant_max) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, scale, zero_point, ch_axis, quant_min, quant_max);
    return ch_axis ? forward_operator(x, scale, zero_point, *ch_axis, quant_min, quant_max)
                   : forward_operator(x, scale, zero_point, quant_min, quant_max);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(ctx, grads[0]), {}, {}, {}, {}, {}};
  }
};

// The mask is constant almost everywhere, so x gets no gradient here.
struct FakeQuantizeBackward : torch::autograd::Function<FakeQuantizeBackward> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& x,
                          const Variable& scale, const Variable& zero_point,
                          std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, scale, zero_point, ch_axis, quant_min, quant_max);
    return ch_axis ? backward_operator(grad, x, scale, zero_point, *ch_axis, quant_min, quant_max)
                   : backward_operator(grad, x, scale, zero_point, quant_min, quant_max);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(ctx, grads[0]), {}, {}, {}, {}, {}, {}};
  }
};

// An argument that gets no gradient must not make the result claim one.
Tensor constant(const Tensor& tensor) { return tensor.requires_grad() ? tensor.detach() : tensor; }

Tensor fake_quantize_per_tensor(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                int64_t quant_min, int64_t quant_max) {
  return FakeQuantize::apply(x, constant(scale), zero_point, std::optional<int64_t>(), quant_min,
                             quant_max);
}

Tensor fake_quantize_per_channel(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                 int64_t ch_axis, int64_t quant_min, int64_t quant_max) {
  return FakeQuantize::apply(x, constant(scale), zero_point, std::optional(ch_axis), quant_min,
                             quant_max);
}

Tensor fake_quantize_per_tensor_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                         const Tensor& zero_point, int64_t quant_min,
                                         int64_t quant_max) {
  return FakeQuantizeBackward::apply(grad, constant(x), constant(scale), zero_point,
                                     std::optional<int64_t>(), quant_min, quant_max);
}

Tensor fake_quantize_per_channel_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                          const Tensor& zero_point, int64_t ch_axis,
                                          int64_t quant_min, int64_t quant_max) {
  return FakeQuantizeBackward::apply(grad, constant(x), constant(scale), zero_point,
                                     std::optional(ch_axis), quant_min, quant_max);
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel);
  m.impl("fake_quantize_per_tensor_backward", fake_quantize_per_tensor_backward);
  m.impl("fake_quantize_per_channel_backward", fake_quantize_per_channel_backward);
}

}  // namespace qtoolkit::autograd
