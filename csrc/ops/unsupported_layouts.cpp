// Sparse, nested and oneDNN tensors: an error that says what to do, in place of PyTorch's list of
// backends.
#include <torch/library.h>

namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_TYPE(false, op.schema().name(),
                   ": an argument is a sparse, nested or oneDNN tensor; this operator takes dense "
                   "tensors, convert it with .to_dense() or to_padded_tensor()");
}

void refuse_all(torch::Library& m) {
  for (const char* name : {"quantize_per_tensor",
                           "quantize_per_channel",
                           "dequantize_per_tensor",
                           "dequantize_per_channel",
                           "fake_quantize_per_tensor",
                           "fake_quantize_per_channel",
                           "fake_quantize_per_group",
                           "fake_quantize_relu",
                           "fake_quantize_mask",
                           "fake_quantize_mask_backward",
                           "fake_quantize_mask_backward_",
                           "observe_fake_quantize",
                           "observe_fake_quantize_mask",
                           "fake_quantize_ternary",
                           "fake_quantize_binary",
                           "fake_quantize_binary_mask",
                           "fake_quantize_float",
                           "fake_quantize_float_mask",
                           "fake_quantize_block_float",
                           "fake_quantize_lsq",
                           "fake_quantize_lsq_backward",
                           "fake_quantize_lsq_backward_",
                           "fake_quantize_pact",
                           "fake_quantize_pact_backward",
                           "fake_quantize_pact_backward_",
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
                           "batch_norm_act",
                           "batch_norm_act_backward",
                           "max_pool2d",
                           "avg_pool2d",
                           "adaptive_avg_pool2d",
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
                           "cat",
                           "run_plan",
                           "conv2d_train",
                           "max_pool2d_train",
                           "max_pool2d_train_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, SparseCPU, m) { refuse_all(m); }
TORCH_LIBRARY_IMPL(qtoolkit, SparseCsrCPU, m) { refuse_all(m); }
TORCH_LIBRARY_IMPL(qtoolkit, NestedTensorCPU, m) { refuse_all(m); }
TORCH_LIBRARY_IMPL(qtoolkit, AutogradNestedTensor, m) { refuse_all(m); }
TORCH_LIBRARY_IMPL(qtoolkit, MkldnnCPU, m) { refuse_all(m); }
