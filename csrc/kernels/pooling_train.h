// Max pooling of float32 in NHWC for training: the forward keeps the place of each maximum in one
// byte, the backward gathers.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Tap t of window (i, j) is row i * row_stride - row_padding + (t / column_kernel) * row_dilation,
// and columns likewise with t % column_kernel; taps outside the input do not count. A window has
// at most 256 taps, one of them inside.
struct MaxPool2dTrainArgs {
  int64_t height = 0, width = 0, channels = 0;  // input
  int64_t out_height = 0, out_width = 0;
  int64_t row_kernel = 1, row_stride = 1, row_padding = 0, row_dilation = 1;
  int64_t column_kernel = 1, column_stride = 1, column_padding = 0, column_dilation = 1;
  const float* x = nullptr;     // forward: [batch, height, width, channels]
  float* y = nullptr;           // forward: [batch, out_height, out_width, channels]
  uint8_t* taps = nullptr;      // forward's second result, backward's input, shaped like y
  const float* grad = nullptr;  // backward: shaped like y
  float* grad_x = nullptr;      // backward: shaped like x
};

// y is the maximum and taps its tap, the first of equal ones; a NaN counts as greatest and the last
// one is taken, as in torch. Units are output rows, flat over batch * out_height.
void max_pool2d_train(const MaxPool2dTrainArgs& args, int64_t begin, int64_t end);
// grad_x is the sum of grad over the windows whose maximum an element is, in the order of the
// windows. Units are input rows, flat over batch * height.
void max_pool2d_train_backward(const MaxPool2dTrainArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
