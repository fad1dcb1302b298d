// Operators without a gradient: their results are codes or statistics, or they are what autograd
// functions call. Without these lines every
// call would pass PyTorch's boxed fallback, and a float result of an input that requires a gradient
// would claim to have one.
#include <torch/library.h>

TORCH_LIBRARY_IMPL(qtoolkit, Autograd, m) {
  for (const char* name :
       {"quantize_per_tensor", "quantize_per_channel", "dequantize_per_tensor",
        "dequantize_per_channel", "fake_quantize_mask", "fake_quantize_mask_backward_",
        "observe_fake_quantize_mask", "min_max", "min_max_per_channel", "histogram", "conv2d",
        "linear", "add", "requantize", "batch_norm", "max_pool2d", "avg_pool2d",
        "adaptive_avg_pool2d", "cat"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}
