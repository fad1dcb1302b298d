// Pooling of 8-bit codes on a GPU. The output is channels_last; a thread computes one code of it.
#include <torch/library.h>

#include <limits>
#include <stdexcept>

#include "ops/cuda/codes.cuh"
#include "ops/windows.h"

namespace qtoolkit::ops {
namespace {

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

// Sizes of NHWC images, and what an output's number says of its place.
struct Images {
  int64_t height, width, channels, out_height, out_width;

  Images(const Tensor& x, const Tensor& y)
      : height(x.size(2)),
        width(x.size(3)),
        channels(x.size(1)),
        out_height(y.size(2)),
        out_width(y.size(3)) {}

  struct Place {
    int64_t image, row, column, channel;
  };
  __device__ Place place(int64_t i) const {
    const int64_t pixel = i / channels, row = pixel / out_width;
    return {row / out_height, row % out_height, pixel % out_width, i % channels};
  }
  __device__ int64_t at(const Place& to, int64_t row, int64_t column) const {
    return ((to.image * height + row) * width + column) * channels + to.channel;
  }
};

struct MaxElement {
  CodesIn x;
  uint8_t* y;
  Images images;
  Window rows, columns;

  __device__ void operator()(int64_t i) const {
    const Images::Place to = images.place(i);
    const int64_t row = to.row * rows.stride - rows.padding;
    const int64_t column = to.column * columns.stride - columns.padding;
    int32_t largest = x.is_signed ? -128 : 0;
    for (int64_t h = 0; h < rows.kernel; ++h) {
      const int64_t from_row = row + h * rows.dilation;
      if (from_row < 0 || from_row >= images.height) continue;
      for (int64_t w = 0; w < columns.kernel; ++w) {
        const int64_t from_column = column + w * columns.dilation;
        if (from_column < 0 || from_column >= images.width) continue;
        largest = max(largest, x.code(images.at(to, from_row, from_column)));
      }
    }
    y[i] = static_cast<uint8_t>(largest);
  }
};

struct AdaptiveElement {
  CodesIn x;
  CodesOut y;
  Images images;

  __device__ void operator()(int64_t i) const {
    const Images::Place to = images.place(i);
    const int64_t top = to.row * images.height / images.out_height;
    const int64_t bottom =
        ((to.row + 1) * images.height + images.out_height - 1) / images.out_height;
    const int64_t left = to.column * images.width / images.out_width;
    const int64_t right =
        ((to.column + 1) * images.width + images.out_width - 1) / images.out_width;
    const int32_t zero_point = *x.qparams.zero_point;
    int32_t sum = 0;
    for (int64_t row = top; row < bottom; ++row) {
      for (int64_t column = left; column < right; ++column) {
        sum += x.code(images.at(to, row, column)) - zero_point;
      }
    }
    const double ratio = static_cast<double>(*x.qparams.scale) / *y.qparams.scale;
    const auto divisor = static_cast<double>((bottom - top) * (right - left));
    y.store(i, static_cast<float>(sum) * static_cast<float>(ratio / divisor));
  }
};

Tensor max_pool2d_cuda(const Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op = find_operator<decltype(max_pool2d_cuda)>("qtoolkit::max_pool2d");
  const Tensor y = op.redispatch(kMeta, x, kernel_size, stride, padding, dilation, ceil_mode);
  const Windows windows =
      check_windows("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode);
  try {  // throws where a window lies in the padding alone
    kernels::max_pool_spans(x.size(2), y.size(2), windows.rows);
    kernels::max_pool_spans(x.size(3), y.size(3), windows.columns);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "qtoolkit::max_pool2d: ", error.what());
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(kFormat);
  for_each(y.numel(), MaxElement{CodesIn(dense), mutable_data<uint8_t>(y), Images(dense, y),
                                 windows.rows, windows.columns});
  return y;
}

Tensor adaptive_avg_pool2d_cuda(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                                at::IntArrayRef output_size, const Tensor& y_scale,
                                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  constexpr const char* name = "adaptive_avg_pool2d";
  static const auto op =
      find_operator<decltype(adaptive_avg_pool2d_cuda)>("qtoolkit::adaptive_avg_pool2d");
  const Tensor y = op.redispatch(kMeta, x, x_scale, x_zero_point, output_size, y_scale,
                                 y_zero_point, quant_min, quant_max);
  constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max() / 255;
  TORCH_CHECK_VALUE(x.size(2) <= kMostPixels / x.size(3), "qtoolkit::", name, ": windows of ",
                    x.size(2), " x ", x.size(3), " pixels could overflow the int32 sum");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(kFormat);
  const CodeRange range = check_quant_range(name, quant_min, quant_max);
  const CodesOut codes{mutable_data<uint8_t>(y), {y_scale, y_zero_point}, range};
  for_each(y.numel(), AdaptiveElement{{dense, x_scale, x_zero_point}, codes, Images(dense, y)});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("max_pool2d", max_pool2d_cuda);
  m.impl("adaptive_avg_pool2d", adaptive_avg_pool2d_cuda);
}

}  // namespace qtoolkit::ops
