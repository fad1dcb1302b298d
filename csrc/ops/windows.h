// The windows of pooling operators, as torch.nn.functional has them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/windows.h"
#include "ops/checks.h"

namespace qtoolkit::ops {

using kernels::Window;

inline c10::SymInt output_size(const char* op, const c10::SymInt& size, const Window& window) {
  TORCH_CHECK_VALUE(size > 0, "qtoolkit::", op, ": only the batch of x may be empty");
  const c10::SymInt room =
      size + 2 * window.padding - window.extent() + (window.ceil_mode ? window.stride - 1 : 0);
  TORCH_CHECK_VALUE(room >= 0, "qtoolkit::", op, ": the window of ", window.extent(),
                    " (dilation included) is larger than the padded input's ",
                    size + 2 * window.padding);
  return kernels::window_count(size, window);
}

struct Windows {
  Window rows, columns;
};

inline Windows check_windows(const char* op, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  if (stride.empty()) stride = kernel_size;
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  const Windows windows = {{kernel_size[0], stride[0], padding[0], dilation[0], ceil_mode},
                           {kernel_size[1], stride[1], padding[1], dilation[1], ceil_mode}};
  for (const Window& window : {windows.rows, windows.columns}) {
    TORCH_CHECK_VALUE(window.padding <= window.kernel / 2, "qtoolkit::", op,
                      ": padding must be at most half the kernel, got padding ", padding,
                      " and kernel_size ", kernel_size);
  }
  return windows;
}

}  // namespace qtoolkit::ops
