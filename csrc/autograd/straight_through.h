// What the autograd functions share: finding operators, when a gradient may be overwritten, and the
// straight-through gradient, a mask of one bit an element.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

namespace qtoolkit::autograd {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether something is to be kept for a gradient. With a tangent of forward-mode differentiation
// too, for which the autograd function then raises PyTorch's error.
inline bool needs_gradient(const Tensor& x) {
  return (at::GradMode::is_enabled() && x.requires_grad()) || x._fw_grad(/*level=*/0).defined();
}

// Whether a backward may overwrite this gradient: nobody else can see it.
bool nobody_else_sees(const Tensor& grad);

// Saves the mask of a tensor in that layout (ops/layout.h).
void save_mask(AutogradContext* ctx, const Tensor& mask, int64_t layout);

// grad where the saved mask's bit is 1, else 0. Overwrites grad where nobody else can see it.
Tensor apply_mask(AutogradContext* ctx, const Tensor& grad);

}  // namespace qtoolkit::autograd
