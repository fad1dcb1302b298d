// Histograms and extremes of groups on CUDA: the CPU operators' results.
#include <ATen/ops/aminmax.h>
#include <torch/library.h>

#include <cfloat>
#include <tuple>

#include "ops/checks.h"
#include "ops/cuda/common.cuh"

namespace qtoolkit::ops {
namespace {

using TensorPair = std::tuple<Tensor, Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;
using Count = unsigned long long;  // what atomicAdd takes

constexpr int64_t kSharedBins = 8192;  // 32 KiB of a block's shared memory

struct Bins {
  float lower, upper, factor, last;
  int64_t count;
};

// Integers are added, so no order of the threads changes a result. With kShared each block counts
// in shared memory first; it has fewer than 2^32 elements.
template <bool kShared, class T>
__global__ void __launch_bounds__(kThreads)
    count_bins(const T* x, int64_t size, bool vectors, Bins bins, Count* counts) {
  extern __shared__ unsigned int table[];
  if constexpr (kShared) {
    for (int64_t bin = threadIdx.x; bin < bins.count; bin += kThreads) table[bin] = 0;
    __syncthreads();
  }
  constexpr int kSize = Word<T>::kSize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
  int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  for (; at < size; at += step) {
    const int64_t left = size - at;
    const int count = left < kSize ? static_cast<int>(left) : kSize;
    float values[kSize];
    unpack(load_word(x + at, count, vectors), values);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      if (k >= count || !(values[k] >= bins.lower && values[k] <= bins.upper)) continue;
      const float place = __fmul_rn(__fsub_rn(values[k], bins.lower), bins.factor);
      const auto bin = static_cast<int64_t>(fminf(place, bins.last));
      if constexpr (kShared) {
        atomicAdd(&table[bin], 1u);
      } else {
        atomicAdd(&counts[bin], Count{1});
      }
    }
  }
  if constexpr (kShared) {
    __syncthreads();
    for (int64_t bin = threadIdx.x; bin < bins.count; bin += kThreads) {
      if (table[bin] != 0) atomicAdd(&counts[bin], Count{table[bin]});
    }
  }
}

Tensor histogram_cuda(const Tensor& x, int64_t bins, double lower, double upper) {
  static const auto op = find_operator<decltype(histogram_cuda)>("qtoolkit::histogram");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor result = op.redispatch(kMeta, x, bins, lower, upper).zero_();
  const auto low = static_cast<float>(lower), high = static_cast<float>(upper);
  const double bins_per_unit =
      static_cast<double>(bins) / (static_cast<double>(high) - static_cast<double>(low));
  const Bins places = {low, high, static_cast<float>(std::min(bins_per_unit, double{FLT_MAX})),
                       static_cast<float>(bins - 1), bins};
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  with_element_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int64_t kMostBlocks = 1024, kWordsPerThread = 8;
    const T* data = const_data<T>(dense);
    auto* counts = reinterpret_cast<Count*>(mutable_data<int64_t>(result));
    const int64_t words = divide_up(x.numel(), Word<T>::kSize);
    const auto blocks = static_cast<unsigned>(
        std::clamp<int64_t>(words / (kThreads * kWordsPerThread), 1, kMostBlocks));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    if (bins <= kSharedBins) {
      const size_t bytes = static_cast<size_t>(bins) * sizeof(unsigned int);
      count_bins<true, T><<<blocks, kThreads, bytes, stream>>>(data, x.numel(), is_aligned({data}),
                                                               places, counts);
    } else {
      count_bins<false, T>
          <<<blocks, kThreads, 0, stream>>>(data, x.numel(), is_aligned({data}), places, counts);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

TensorTriple histogram_min_max_cuda(const Tensor& x, int64_t bins, double lower, double upper) {
  static const auto min_max = find_operator<TensorPair(const Tensor&)>("qtoolkit::min_max");
  const Tensor counts = histogram_cuda(x, bins, lower, upper);
  const TensorPair extremes = min_max.call(x);
  return {counts, std::get<0>(extremes), std::get<1>(extremes)};
}

TensorPair min_max_per_group_cuda(const Tensor& x, int64_t group_size, int64_t axis) {
  static const auto op =
      find_operator<decltype(min_max_per_group_cuda)>("qtoolkit::min_max_per_group");
  const c10::cuda::CUDAGuard guard(x.device());
  const TensorPair result = op.redispatch(kMeta, x, group_size, axis);
  axis = check_ch_axis("min_max_per_group", x, axis);
  const int64_t length = x.size(axis), whole = length / group_size;
  // The extremes along a dimension of `values` are those of `groups` groups from `first` on.
  const auto take = [&](const Tensor& values, int64_t dimension, int64_t first, int64_t groups) {
    const auto extremes = at::aminmax(values.to(at::kFloat), dimension);
    std::get<0>(result).narrow(axis, first, groups).copy_(std::get<0>(extremes));
    std::get<1>(result).narrow(axis, first, groups).copy_(std::get<1>(extremes));
  };
  if (whole > 0) {
    const Tensor groups =
        x.narrow(axis, 0, whole * group_size).unflatten(axis, {whole, group_size});
    take(groups, axis + 1, 0, whole);
  }
  if (whole * group_size < length) {
    const int64_t rest = length - whole * group_size;
    take(x.narrow(axis, whole * group_size, rest).unsqueeze(axis), axis + 1, whole, 1);
  }
  // -0 counts as +0.
  std::get<0>(result).add_(0.0);
  std::get<1>(result).add_(0.0);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("min_max_per_group", min_max_per_group_cuda);
  m.impl("histogram", histogram_cuda);
  m.impl("histogram_min_max", histogram_min_max_cuda);
}

}  // namespace qtoolkit::ops
