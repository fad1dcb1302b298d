// What the devices share of max pooling for training.
#pragma once

#include "kernels/pooling_train.h"
#include "ops/windows.h"

namespace qtoolkit::ops {

// The checked windows, of at most 256 elements.
Windows check_max_pool2d_train(const char* op, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);

// ValueError where one of `count` windows over `size` elements lies in the padding alone, as it has
// no maximum.
void check_windows_meet_input(const char* op, const Window& window, int64_t size, int64_t count);

// Sizes only. input and output are [N, C, H, W].
kernels::MaxPool2dTrainArgs max_pool2d_train_args(const Windows& windows, const Tensor& input,
                                                  const Tensor& output);

}  // namespace qtoolkit::ops
