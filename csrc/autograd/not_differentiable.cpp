// Operators without a gradient: their results are codes or statistics, or they are what autograd
// functions call. Without these lines every call would pass PyTorch's boxed fallback, and a float
// result of an input that requires a gradient would claim to have one.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  for (const char* name : {"quantize_per_tensor",
                           "quantize_per_channel",
                           "dequantize_per_tensor",
                           "dequantize_per_channel",
                           "fake_quantize_mask",
                           "observe_fake_quantize_mask",
                           "fake_quantize_binary_mask",
                           "fake_quantize_float_mask",
                           "min_max",
                           "min_max_per_channel",
                           "min_max_per_group",
                           "histogram",
                           "histogram_min_max",
                           "range_l2",
                           "range_kl",
                           "range_mse",
                           "range_mse_per_channel",
                           "rebin_histogram",
                           "conv2d",
                           "conv_transpose2d",
                           "linear",
                           "linear_dynamic",
                           "linear_weight_only",
                           "linear_weight_only_exact",
                           "matmul",
                           "add",
                           "mul",
                           "requantize",
                           "lookup",
                           "batch_norm",
                           "max_pool2d",
                           "max_pool2d_train_backward",
                           "avg_pool2d",
                           "adaptive_avg_pool2d",
                           "run_plan",
                           "upsample_nearest2d",
                           "upsample_bilinear2d",
                           "pad",
                           "channel_shuffle",
                           "pixel_shuffle",
                           "pixel_unshuffle",
                           "mean",
                           "softmax",
                           "layer_norm",
                           "sum",
                           "cat"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

namespace {

// Operators that write a result over their first argument: one that requires a gradient is refused,
// and what was saved of the argument before is noticed to have changed.
void write_over(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t arguments = op.schema().arguments().size();
  const at::Tensor changed = stack->at(stack->size() - arguments).toTensor();
  TORCH_CHECK(!at::GradMode::is_enabled() || !changed.requires_grad(), op.schema().name(),
              ": grad requires a gradient and would be overwritten; use the operator without _");
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  if (!changed.is_inference()) changed.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  for (const char* name : {"fake_quantize_mask_backward_", "fake_quantize_lsq_backward_",
                           "fake_quantize_pact_backward_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&write_over>());
  }
}
