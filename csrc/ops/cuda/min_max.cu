// Minimum and maximum of float tensors on CUDA: the CPU operators' bits. Blocks reduce parts of the
// data to one pair of extremes for each channel and part, a second launch reduces the parts.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "ops/checks.h"
#include "ops/layout.h"

namespace qtoolkit::ops {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32;                // of one block of reduce_outer
constexpr int kRows = kThreads / kColumns;  // likewise
constexpr int64_t kWantedBlocks = 1024;     // fill every GPU, and leave few parts
constexpr int64_t kLeastPerThread = 8;      // elements that make a part worth its launch
constexpr int64_t kMostGridY = 65535;

// NaN if anything taken was NaN. -0 counts as +0.
struct Extremes {
  float minimum, maximum;

  static __device__ Extremes none() {
    return {__int_as_float(0x7f800000), __int_as_float(0xff800000)};  // Inf, -Inf
  }
  __device__ void take(float low, float high) {
    const bool nan = isnan(low) || isnan(minimum);
    const float quiet_nan = __int_as_float(0x7fc00000);
    minimum = nan ? quiet_nan : fminf(minimum, __fadd_rn(low, 0.0f));
    maximum = nan ? quiet_nan : fmaxf(maximum, __fadd_rn(high, 0.0f));
  }
};

// Data seen as [outer, channels, inner]: minima and maxima of what was reduced before, twice the
// same pointer at first.
struct Input {
  const float* low;
  const float* high;
  int64_t outer, channels, inner;
};

// [parts, channels]
struct Output {
  float* low;
  float* high;
};

// Block (c, part) reduces its part of channel c. For long runs of a channel.
__global__ void reduce_channel(Input x, Output y) {
  const int64_t channel = blockIdx.x;
  const int64_t step = gridDim.y * static_cast<int64_t>(blockDim.x);
  const int64_t outer_step = step / x.inner, inner_step = step % x.inner;
  const int64_t first = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  int64_t o = first / x.inner, i = first % x.inner;
  Extremes extremes = Extremes::none();
  while (o < x.outer) {
    const int64_t at = (o * x.channels + channel) * x.inner + i;
    extremes.take(x.low[at], x.high[at]);
    o += outer_step;
    i += inner_step;
    if (i >= x.inner) {
      i -= x.inner;
      ++o;
    }
  }
  __shared__ Extremes shared[kThreads];
  shared[threadIdx.x] = extremes;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      const Extremes& other = shared[threadIdx.x + half];
      shared[threadIdx.x].take(other.minimum, other.maximum);
    }
  }
  if (threadIdx.x == 0) {
    const int64_t at = blockIdx.y * x.channels + channel;
    y.low[at] = shared[0].minimum;
    y.high[at] = shared[0].maximum;
  }
}

// Reduces `outer` only: block (b, part) has columns [b * kColumns, …) of [outer, channels * inner].
// y is [parts, channels, inner]. For short runs, where neighbours belong to different channels.
__global__ void reduce_outer(Input x, Output y) {
  const int64_t columns = x.channels * x.inner;
  const int64_t column = blockIdx.x * static_cast<int64_t>(kColumns) + threadIdx.x;
  Extremes extremes = Extremes::none();
  if (column < columns) {
    const int64_t step = gridDim.y * static_cast<int64_t>(kRows);
    for (int64_t o = blockIdx.y * static_cast<int64_t>(kRows) + threadIdx.y; o < x.outer;
         o += step) {
      extremes.take(x.low[o * columns + column], x.high[o * columns + column]);
    }
  }
  __shared__ Extremes shared[kRows][kColumns];
  shared[threadIdx.y][threadIdx.x] = extremes;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    for (int row = 1; row < kRows; ++row) {
      const Extremes& other = shared[row][threadIdx.x];
      extremes.take(other.minimum, other.maximum);
    }
    y.low[blockIdx.y * columns + column] = extremes.minimum;
    y.high[blockIdx.y * columns + column] = extremes.maximum;
  }
}

// How many parts to cut work into, where one part has `blocks` blocks and the elements of one
// thread of one part are `per_thread`.
unsigned parts_for(int64_t blocks, int64_t per_thread) {
  const int64_t wanted = std::min((kWantedBlocks + blocks - 1) / blocks, kMostGridY);
  return static_cast<unsigned>(std::clamp<int64_t>(per_thread / kLeastPerThread, 1, wanted));
}

using TensorPair = std::tuple<Tensor, Tensor>;

TensorPair empty_pair(const Tensor& x, at::IntArrayRef sizes) {
  const auto options = x.options().dtype(at::kFloat);
  return {at::empty(sizes, options), at::empty(sizes, options)};
}

Output output_of(const TensorPair& pair) {
  return {std::get<0>(pair).mutable_data_ptr<float>(), std::get<1>(pair).mutable_data_ptr<float>()};
}

// result has view.channels elements.
void run(const Tensor& x, const ChannelView& view, const TensorPair& result) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor dense = x.to(at::kFloat).contiguous(x.suggest_memory_format());
  const auto* data = dense.const_data_ptr<float>();
  const Input input = {data, data, view.outer, view.channels, view.inner};
  const auto channels = static_cast<unsigned>(view.channels);

  if (view.inner >= kColumns) {
    const unsigned parts = parts_for(channels, view.outer * view.inner / kThreads);
    if (parts == 1) {
      reduce_channel<<<channels, kThreads, 0, stream>>>(input, output_of(result));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
    const TensorPair partial = empty_pair(x, {parts, view.channels});
    const Output between = output_of(partial);
    reduce_channel<<<dim3(channels, parts), kThreads, 0, stream>>>(input, between);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    reduce_channel<<<channels, kThreads, 0, stream>>>(
        {between.low, between.high, parts, view.channels, 1}, output_of(result));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const int64_t columns = view.channels * view.inner;
  const auto blocks = static_cast<unsigned>((columns + kColumns - 1) / kColumns);
  const unsigned parts = parts_for(blocks, view.outer / kRows);
  const TensorPair partial = empty_pair(x, {parts, columns});
  const Output between = output_of(partial);
  reduce_outer<<<dim3(blocks, parts), dim3(kColumns, kRows), 0, stream>>>(input, between);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  reduce_channel<<<channels, kThreads, 0, stream>>>(
      {between.low, between.high, parts, view.channels, view.inner}, output_of(result));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void check_input(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.numel() != 0, "qtoolkit::", op, ": x is empty, ", describe(x),
                    "; it has no statistics");
}

TensorPair min_max_cuda(const Tensor& x) {
  check_input("min_max", x);
  TensorPair result = empty_pair(x, {});
  run(x, {1, 1, x.numel()}, result);
  return result;
}

TensorPair min_max_per_channel_cuda(const Tensor& x, int64_t ch_axis) {
  check_input("min_max_per_channel", x);
  ch_axis = check_ch_axis("min_max_per_channel", x, ch_axis);
  TensorPair result = empty_pair(x, x.sizes().slice(ch_axis, 1));
  run(x, channel_view(x.sizes(), ch_axis, x.suggest_memory_format()), result);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("min_max", min_max_cuda);
  m.impl("min_max_per_channel", min_max_per_channel_cuda);
}

}  // namespace qtoolkit::ops
