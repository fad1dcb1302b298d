// Max pooling of floats for training on CUDA: the CPU operators' bits; see kernels/pooling_train.h.
#include <torch/library.h>

#include <tuple>

#include "ops/cuda/common.cuh"
#include "ops/pooling_train.h"

namespace qtoolkit::ops {
namespace {

using kernels::MaxPool2dTrainArgs;

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

// kSize neighbouring channels.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  T values[kSize];
};

// A place in an NHWC tensor: pack `channel / kSize` of pixel (row, column) of image n.
struct Place {
  int64_t n, row, column, channel;
};

class Places {
 public:
  Places(int64_t batch, int64_t height, int64_t width, int64_t channels, int size)
      : size_(size),
        count_(batch * height * width * (channels / size)),
        packs_(channels / size, count_),
        width_(width, count_),
        height_(height, count_) {}
  __host__ __device__ int64_t count() const { return count_; }
  __device__ Place operator[](int64_t i) const {
    const int64_t pixel = packs_.divide(i), row = width_.divide(pixel), n = height_.divide(row);
    return {n, row - n * height_.divisor(), pixel - row * width_.divisor(),
            (i - pixel * packs_.divisor()) * size_};
  }

 private:
  int size_;
  int64_t count_;
  Divider packs_, width_, height_;
};

template <int kSize>
__global__ void __launch_bounds__(kThreads) forward_kernel(MaxPool2dTrainArgs args, Places places) {
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < places.count();
       i += step) {
    const Place at = places[i];
    const int64_t first_row = at.row * args.row_stride - args.row_padding;
    const int64_t first_column = at.column * args.column_stride - args.column_padding;
    Pack<float, kSize> largest;
    int tap[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      largest.values[k] = -kInf;
      tap[k] = -1;
    }
    for (int r = 0; r < args.row_kernel; ++r) {
      const int64_t h = first_row + r * args.row_dilation;
      if (h < 0 || h >= args.height) continue;
      for (int c = 0; c < args.column_kernel; ++c) {
        const int64_t w = first_column + c * args.column_dilation;
        if (w < 0 || w >= args.width) continue;
        const auto x = *reinterpret_cast<const Pack<float, kSize>*>(
            args.x + ((at.n * args.height + h) * args.width + w) * args.channels + at.channel);
        const int current = r * static_cast<int>(args.column_kernel) + c;
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const float value = x.values[k];
          if (tap[k] < 0 || value > largest.values[k] || isnan(value)) {
            largest.values[k] = value;
            tap[k] = current;
          }
        }
      }
    }
    Pack<uint8_t, kSize> taps;
#pragma unroll
    for (int k = 0; k < kSize; ++k) taps.values[k] = static_cast<uint8_t>(tap[k]);
    // i counts packs of the outputs in their order.
    reinterpret_cast<Pack<float, kSize>*>(args.y)[i] = largest;
    reinterpret_cast<Pack<uint8_t, kSize>*>(args.taps)[i] = taps;
  }
}

// The first window that reaches a place, in windows from the padded edge on.
__device__ int64_t first_window(int64_t padded, int64_t kernel, int64_t dilation, int64_t stride) {
  const int64_t from = padded - (kernel - 1) * dilation;
  return from <= 0 ? 0 : (from + stride - 1) / stride;
}

template <int kSize>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(MaxPool2dTrainArgs args, Places places) {
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t place = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
       place < places.count(); place += step) {
    const Place at = places[place];
    const int64_t row = at.row + args.row_padding, column = at.column + args.column_padding;
    const int64_t first_i = first_window(row, args.row_kernel, args.row_dilation, args.row_stride);
    const int64_t first_j =
        first_window(column, args.column_kernel, args.column_dilation, args.column_stride);
    Pack<float, kSize> sum = {};
    for (int64_t i = first_i; i < args.out_height && i * args.row_stride <= row; ++i) {
      const int64_t in_rows = row - i * args.row_stride;
      const int64_t r = args.row_dilation == 1 ? in_rows : in_rows / args.row_dilation;
      if (r * args.row_dilation != in_rows) continue;
      for (int64_t j = first_j; j < args.out_width && j * args.column_stride <= column; ++j) {
        const int64_t in_columns = column - j * args.column_stride;
        const int64_t c =
            args.column_dilation == 1 ? in_columns : in_columns / args.column_dilation;
        if (c * args.column_dilation != in_columns) continue;
        const auto tap = static_cast<uint8_t>(r * args.column_kernel + c);
        const int64_t from =
            ((at.n * args.out_height + i) * args.out_width + j) * args.channels + at.channel;
        const auto taps = *reinterpret_cast<const Pack<uint8_t, kSize>*>(args.taps + from);
        const auto grad = *reinterpret_cast<const Pack<float, kSize>*>(args.grad + from);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (taps.values[k] == tap) sum.values[k] = __fadd_rn(sum.values[k], grad.values[k]);
        }
      }
    }
    reinterpret_cast<Pack<float, kSize>*>(args.grad_x)[place] = sum;
  }
}

unsigned blocks_for(const Places& places) {
  constexpr int64_t kMostBlocks = 65536;  // the threads of more go round again
  return static_cast<unsigned>(std::min(divide_up(places.count(), kThreads), kMostBlocks));
}

bool in_packs(int64_t channels, std::initializer_list<const void*> pointers) {
  return channels % 4 == 0 && is_aligned(pointers);
}

std::tuple<Tensor, Tensor> max_pool2d_train_cuda(const Tensor& x, at::IntArrayRef kernel_size,
                                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                                 at::IntArrayRef dilation, bool ceil_mode) {
  constexpr const char* name = "max_pool2d_train";
  static const auto op =
      find_operator<decltype(max_pool2d_train_cuda)>("qtoolkit::max_pool2d_train");
  const std::tuple<Tensor, Tensor> result =
      op.redispatch(kMeta, x, kernel_size, stride, padding, dilation, ceil_mode);
  const auto& [y, taps] = result;
  if (y.numel() == 0) return result;
  const Windows windows =
      check_max_pool2d_train(name, kernel_size, stride, padding, dilation, ceil_mode);
  check_windows_meet_input(name, windows.rows, x.size(2), y.size(2));
  check_windows_meet_input(name, windows.columns, x.size(3), y.size(3));
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor dense = x.contiguous(kFormat);
  MaxPool2dTrainArgs args = max_pool2d_train_args(windows, dense, y);
  args.x = const_data<float>(dense);
  args.y = mutable_data<float>(y);
  args.taps = mutable_data<uint8_t>(taps);
  const bool packs = in_packs(args.channels, {args.x, args.y, args.taps});
  const Places places(y.size(0), args.out_height, args.out_width, args.channels, packs ? 4 : 1);
  const auto kernel = packs ? forward_kernel<4> : forward_kernel<1>;
  kernel<<<blocks_for(places), kThreads, 0, stream>>>(args, places);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor max_pool2d_train_backward_cuda(const Tensor& grad, const Tensor& taps,
                                      at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation,
                                      c10::SymInt height, c10::SymInt width) {
  constexpr const char* name = "max_pool2d_train_backward";
  static const auto op = find_operator<decltype(max_pool2d_train_backward_cuda)>(
      "qtoolkit::max_pool2d_train_backward");
  const Tensor grad_x =
      op.redispatch(kMeta, grad, taps, kernel_size, stride, padding, dilation, height, width);
  if (grad_x.numel() == 0) return grad_x;
  const Windows windows =
      check_max_pool2d_train(name, kernel_size, stride, padding, dilation, false);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor dense = grad.contiguous(kFormat), dense_taps = taps.contiguous(kFormat);
  MaxPool2dTrainArgs args = max_pool2d_train_args(windows, grad_x, dense);
  args.grad = const_data<float>(dense);
  args.taps = const_cast<uint8_t*>(const_data<uint8_t>(dense_taps));
  args.grad_x = mutable_data<float>(grad_x);
  const bool packs = in_packs(args.channels, {args.grad, args.taps, args.grad_x});
  const Places places(grad_x.size(0), args.height, args.width, args.channels, packs ? 4 : 1);
  const auto kernel = packs ? backward_kernel<4> : backward_kernel<1>;
  kernel<<<blocks_for(places), kThreads, 0, stream>>>(args, places);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("max_pool2d_train", max_pool2d_train_cuda);
  m.impl("max_pool2d_train_backward", max_pool2d_train_backward_cuda);
}

}  // namespace qtoolkit::ops
