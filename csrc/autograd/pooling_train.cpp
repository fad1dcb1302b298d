// Gradient of max_pool2d_train.
#include <torch/library.h>

#include <tuple>

#include "autograd/straight_through.h"

namespace qtoolkit::autograd {
namespace {

using Forward = std::tuple<Tensor, Tensor>(const Tensor& x, at::IntArrayRef kernel_size,
                                           at::IntArrayRef stride, at::IntArrayRef padding,
                                           at::IntArrayRef dilation, bool ceil_mode);
using Backward = Tensor(const Tensor& grad, const Tensor& taps, at::IntArrayRef kernel_size,
                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                        c10::SymInt height, c10::SymInt width);

struct MaxPool2dTrain : torch::autograd::Function<MaxPool2dTrain> {
  static variable_list forward(AutogradContext* ctx, const Variable& x, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool ceil_mode) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find<Forward>("qtoolkit::max_pool2d_train");
    const auto [y, taps] = op.call(x, kernel_size, stride, padding, dilation, ceil_mode);
    ctx->mark_non_differentiable({taps});
    ctx->save_for_backward({taps});
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["height"] = x.sym_size(2);
    ctx->saved_data["width"] = x.sym_size(3);
    return {y, taps};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (!grads[0].defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "qtoolkit::max_pool2d_train has no second derivatives; use "
                "torch.nn.functional.max_pool2d for them");
    static const auto op = find<Backward>("qtoolkit::max_pool2d_train_backward");
    result[0] = op.call(
        grads[0], ctx->get_saved_variables()[0], ctx->saved_data["kernel_size"].toIntVector(),
        ctx->saved_data["stride"].toIntVector(), ctx->saved_data["padding"].toIntVector(),
        ctx->saved_data["dilation"].toIntVector(), ctx->saved_data["height"].toSymInt(),
        ctx->saved_data["width"].toSymInt());
    return result;
  }
};

std::tuple<Tensor, Tensor> max_pool2d_train(const Tensor& x, at::IntArrayRef kernel_size,
                                            at::IntArrayRef stride, at::IntArrayRef padding,
                                            at::IntArrayRef dilation, bool ceil_mode) {
  const variable_list result =
      MaxPool2dTrain::apply(x, kernel_size, stride, padding, dilation, ceil_mode);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) { m.impl("max_pool2d_train", max_pool2d_train); }

}  // namespace qtoolkit::autograd
