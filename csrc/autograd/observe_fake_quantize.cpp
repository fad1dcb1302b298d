// The gradient of observe_fake_quantize: straight-through, of x only. The range is data, not a
// function to differentiate.
#include <torch/library.h>

#include <tuple>

#include "autograd/straight_through.h"
#include "ops/layout.h"

namespace qtoolkit::autograd {
namespace {

struct ObserveFakeQuantize : torch::autograd::Function<ObserveFakeQuantize> {
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& min_val,
                          const Variable& max_val, const Variable& scale,
                          const Variable& zero_point, double averaging_constant, int64_t quant_min,
                          int64_t quant_max, bool symmetric) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        const Tensor&, double, int64_t, int64_t, bool)>(
            "qtoolkit::observe_fake_quantize_mask");
    auto [y, mask] = op.call(x, min_val, max_val, scale, zero_point, averaging_constant, quant_min,
                             quant_max, symmetric);
    save_mask(ctx, mask, ops::layout_of(x.suggest_memory_format()));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(ctx, grads[0]), {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

Tensor observe_fake_quantize(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
                             const Tensor& scale, const Tensor& zero_point,
                             double averaging_constant, int64_t quant_min, int64_t quant_max,
                             bool symmetric) {
  for (const Tensor& state : {min_val, max_val, scale, zero_point}) {
    TORCH_CHECK_VALUE(!state.requires_grad(),
                      "qtoolkit::observe_fake_quantize: min_val, max_val, scale and zero_point are "
                      "changed in place and get no gradient; they must not require one");
    // Tensors that were saved for some backward before are then known to be changed.
    if (!state.is_inference()) torch::autograd::impl::bump_version(state);
  }
  if (!needs_gradient(x)) {
    static const auto op = find<decltype(observe_fake_quantize)>("qtoolkit::observe_fake_quantize");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, min_val, max_val, scale, zero_point, averaging_constant, quant_min, quant_max,
                   symmetric);
  }
  return ObserveFakeQuantize::apply(x, min_val, max_val, scale, zero_point, averaging_constant,
                                    quant_min, quant_max, symmetric);
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  m.impl("observe_fake_quantize", observe_fake_quantize);
}

}  // namespace qtoolkit::autograd
