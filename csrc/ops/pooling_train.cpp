// Max pooling of floats for training. It keeps one byte for each output where torch keeps eight,
// and its backward writes each gradient once.
#include "ops/pooling_train.h"

#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {

Windows check_max_pool2d_train(const char* op, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                               at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  constexpr int64_t kMostTaps = 256;  // their numbers are bytes
  const Windows windows = check_windows(op, kernel_size, stride, padding, dilation, ceil_mode);
  TORCH_CHECK_VALUE(windows.rows.kernel <= kMostTaps && windows.columns.kernel <= kMostTaps &&
                        windows.rows.kernel * windows.columns.kernel <= kMostTaps,
                    "qtoolkit::", op, ": kernel_size may have at most ", kMostTaps,
                    " elements, got ", kernel_size, "; use torch.nn.functional.max_pool2d");
  return windows;
}

void check_windows_meet_input(const char* op, const Window& window, int64_t size, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t first = i * window.stride - window.padding;
    const int64_t end = std::min(first + window.extent(), size);
    while (first < 0) first += window.dilation;
    TORCH_CHECK_VALUE(first < end, "qtoolkit::", op, ": window ", i,
                      " lies in the padding alone; use less padding or dilation");
  }
}

kernels::MaxPool2dTrainArgs max_pool2d_train_args(const Windows& windows, const Tensor& input,
                                                  const Tensor& output) {
  return {.height = input.size(2),
          .width = input.size(3),
          .channels = input.size(1),
          .out_height = output.size(2),
          .out_width = output.size(3),
          .row_kernel = windows.rows.kernel,
          .row_stride = windows.rows.stride,
          .row_padding = windows.rows.padding,
          .row_dilation = windows.rows.dilation,
          .column_kernel = windows.columns.kernel,
          .column_stride = windows.columns.stride,
          .column_padding = windows.columns.padding,
          .column_dilation = windows.columns.dilation};
}

namespace {

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

std::tuple<Tensor, Tensor> max_pool2d_train_meta(const Tensor& x, at::IntArrayRef kernel_size,
                                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                                 at::IntArrayRef dilation, bool ceil_mode) {
  constexpr const char* op = "max_pool2d_train";
  check_dtype(op, "x", x, at::kFloat);
  check_rank(op, "x", x, 4);
  const Windows windows =
      check_max_pool2d_train(op, kernel_size, stride, padding, dilation, ceil_mode);
  const c10::SymInt height = output_size(op, x.sym_size(2), windows.rows);
  const c10::SymInt width = output_size(op, x.sym_size(3), windows.columns);
  const std::vector<c10::SymInt> sizes = {x.sym_size(0), x.sym_size(1), height, width};
  return {empty_beside(x, sizes, at::kFloat, kFormat), empty_beside(x, sizes, at::kByte, kFormat)};
}

Tensor max_pool2d_train_backward_meta(const Tensor& grad, const Tensor& taps,
                                      at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation,
                                      c10::SymInt height, c10::SymInt width) {
  constexpr const char* op = "max_pool2d_train_backward";
  check_dtype(op, "grad", grad, at::kFloat);
  check_rank(op, "grad", grad, 4);
  check_dtype(op, "taps", taps, at::kByte);
  check_device(op, "taps", taps, grad);
  TORCH_CHECK_VALUE(grad.sym_sizes() == taps.sym_sizes(), "qtoolkit::", op,
                    ": grad must have the shape of taps, got ", describe(grad), " and ",
                    describe(taps));
  check_max_pool2d_train(op, kernel_size, stride, padding, dilation, false);
  TORCH_CHECK_VALUE(height > 0 && width > 0, "qtoolkit::", op,
                    ": height and width are the input's and must be positive");
  const std::vector<c10::SymInt> sizes = {grad.sym_size(0), grad.sym_size(1), height, width};
  return empty_beside(grad, sizes, at::kFloat, kFormat);
}

std::tuple<Tensor, Tensor> max_pool2d_train_cpu(const Tensor& x, at::IntArrayRef kernel_size,
                                                at::IntArrayRef stride, at::IntArrayRef padding,
                                                at::IntArrayRef dilation, bool ceil_mode) {
  constexpr const char* op = "max_pool2d_train";
  const std::tuple<Tensor, Tensor> result =
      max_pool2d_train_meta(x, kernel_size, stride, padding, dilation, ceil_mode);
  const auto& [y, taps] = result;
  if (y.numel() == 0) return result;
  const Windows windows =
      check_max_pool2d_train(op, kernel_size, stride, padding, dilation, ceil_mode);
  check_windows_meet_input(op, windows.rows, x.size(2), y.size(2));
  check_windows_meet_input(op, windows.columns, x.size(3), y.size(3));
  const Tensor dense = x.contiguous(kFormat);
  kernels::MaxPool2dTrainArgs args = max_pool2d_train_args(windows, dense, y);
  args.x = dense.const_data_ptr<float>();
  args.y = y.mutable_data_ptr<float>();
  args.taps = taps.mutable_data_ptr<uint8_t>();
  at::parallel_for(
      0, y.size(0) * y.size(2), grain_of(kElementGrain, y.size(3) * y.size(1)),
      [&](int64_t begin, int64_t end) { kernels::max_pool2d_train(args, begin, end); });
  return result;
}

Tensor max_pool2d_train_backward_cpu(const Tensor& grad, const Tensor& taps,
                                     at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation,
                                     c10::SymInt height, c10::SymInt width) {
  const Tensor grad_x = max_pool2d_train_backward_meta(grad, taps, kernel_size, stride, padding,
                                                       dilation, height, width);
  if (grad_x.numel() == 0) return grad_x;
  const Windows windows = check_max_pool2d_train("max_pool2d_train_backward", kernel_size, stride,
                                                 padding, dilation, false);
  const Tensor dense = grad.contiguous(kFormat), dense_taps = taps.contiguous(kFormat);
  kernels::MaxPool2dTrainArgs args = max_pool2d_train_args(windows, grad_x, dense);
  args.grad = dense.const_data_ptr<float>();
  args.taps = const_cast<uint8_t*>(dense_taps.const_data_ptr<uint8_t>());
  args.grad_x = grad_x.mutable_data_ptr<float>();
  at::parallel_for(
      0, grad_x.size(0) * grad_x.size(2), grain_of(kElementGrain, grad_x.size(3) * grad_x.size(1)),
      [&](int64_t begin, int64_t end) { kernels::max_pool2d_train_backward(args, begin, end); });
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "max_pool2d_train(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool ceil_mode) -> (Tensor, Tensor)",
      tags);
  m.def(
      "max_pool2d_train_backward(Tensor grad, Tensor taps, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, SymInt height, SymInt width) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("max_pool2d_train", max_pool2d_train_meta);
  m.impl("max_pool2d_train_backward", max_pool2d_train_backward_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("max_pool2d_train", max_pool2d_train_cpu);
  m.impl("max_pool2d_train_backward", max_pool2d_train_backward_cpu);
}

}  // namespace qtoolkit::ops
