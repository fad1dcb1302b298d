// The straight-through gradients of fake-quantize to few values: of x only. Where everything
// passes, the gradient is passed on as it is; elsewhere a mask of one bit an element is kept.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "autograd/straight_through.h"
#include "ops/layout.h"

namespace qtoolkit::autograd {
namespace {

using OptionalInt = std::optional<int64_t>;
using OptionalTensor = std::optional<Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;

// y, which operator() makes of x, with a gradient that passes everywhere.
struct PassEverywhere : torch::autograd::Function<PassEverywhere> {
  static constexpr bool is_traceable = true;

  template <class MakeResult>
  static Variable forward(AutogradContext* /*ctx*/, const Variable& x, const MakeResult& make) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return make(x);
  }

  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& grads) {
    return {grads[0], {}};
  }
};

// The same where make gives a mask too.
struct PassByMask : torch::autograd::Function<PassByMask> {
  static constexpr bool is_traceable = true;

  template <class MakeResult>
  static Variable forward(AutogradContext* ctx, const Variable& x, const MakeResult& make) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, mask] = make(x);
    save_mask(ctx, mask, ops::layout_of(x.suggest_memory_format()));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {apply_mask(ctx, grads[0]), {}};
  }
};

template <class MakeResult>
Tensor without_gradient(const Tensor& x, const MakeResult& make) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return make(x);
}

Tensor fake_quantize_ternary(const Tensor& x, const Tensor& scale, const Tensor& threshold,
                             OptionalInt ch_axis) {
  static const auto op = find<decltype(fake_quantize_ternary)>("qtoolkit::fake_quantize_ternary");
  const auto make = [&](const Tensor& from) { return op.call(from, scale, threshold, ch_axis); };
  return needs_gradient(x) ? PassEverywhere::apply(x, make) : without_gradient(x, make);
}

Tensor fake_quantize_block_float(const Tensor& x, const OptionalTensor& tensor_scale,
                                 int64_t block_size, int64_t mantissa_bits, int64_t min_exponent,
                                 double max_value, std::string_view scale_format) {
  static const auto op =
      find<decltype(fake_quantize_block_float)>("qtoolkit::fake_quantize_block_float");
  const auto make = [&](const Tensor& from) {
    return op.call(from, tensor_scale, block_size, mantissa_bits, min_exponent, max_value,
                   scale_format);
  };
  return needs_gradient(x) ? PassEverywhere::apply(x, make) : without_gradient(x, make);
}

Tensor fake_quantize_binary(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                            double clip) {
  if (!needs_gradient(x)) {
    static const auto op = find<decltype(fake_quantize_binary)>("qtoolkit::fake_quantize_binary");
    return without_gradient(
        x, [&](const Tensor& from) { return op.call(from, scale, ch_axis, clip); });
  }
  static const auto op = find<TensorPair(const Tensor&, const Tensor&, OptionalInt, double)>(
      "qtoolkit::fake_quantize_binary_mask");
  return PassByMask::apply(x,
                           [&](const Tensor& from) { return op.call(from, scale, ch_axis, clip); });
}

Tensor fake_quantize_float(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                           int64_t mantissa_bits, int64_t min_exponent, double max_value) {
  if (!needs_gradient(x)) {
    static const auto op = find<decltype(fake_quantize_float)>("qtoolkit::fake_quantize_float");
    return without_gradient(x, [&](const Tensor& from) {
      return op.call(from, scale, ch_axis, mantissa_bits, min_exponent, max_value);
    });
  }
  static const auto op =
      find<TensorPair(const Tensor&, const Tensor&, OptionalInt, int64_t, int64_t, double)>(
          "qtoolkit::fake_quantize_float_mask");
  return PassByMask::apply(x, [&](const Tensor& from) {
    return op.call(from, scale, ch_axis, mantissa_bits, min_exponent, max_value);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  m.impl("fake_quantize_ternary", fake_quantize_ternary);
  m.impl("fake_quantize_binary", fake_quantize_binary);
  m.impl("fake_quantize_float", fake_quantize_float);
  m.impl("fake_quantize_block_float", fake_quantize_block_float);
}

}  // namespace qtoolkit::autograd
