// Fake-quantize with the straight-through gradient on CUDA: the CPU operators' bits. The values of
// scale and zero_point are not checked, as that would wait for the GPU.
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "ops/cuda/fake_quantize.cuh"

namespace qtoolkit::ops {
namespace {

using OptionalInt = std::optional<int64_t>;
using TensorPair = std::tuple<Tensor, Tensor>;

// y, and the mask if it is defined, of checked arguments.
void run(const Tensor& x, const Tensor& scale, const Tensor& zero_point, OptionalInt ch_axis,
         OptionalInt group_size, int64_t quant_min, int64_t quant_max, bool relu, const Tensor& y,
         const Tensor& mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format =
      group_size ? at::MemoryFormat::Contiguous : x.suggest_memory_format();
  const Tensor dense = x.contiguous(format);
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  const FakeQuantizeOp op{.qparams = {.scale = const_data<float>(scales),
                                      .zero_point = const_data<int32_t>(zero_points),
                                      .quant_min = static_cast<int32_t>(quant_min),
                                      .quant_max = static_cast<int32_t>(quant_max)},
                          .relu = relu};
  ParamView view;
  if (ch_axis) {
    const int64_t axis = *ch_axis < 0 ? *ch_axis + x.dim() : *ch_axis;
    view = ParamView::of(channel_view(x.sizes(), axis, format));
  } else if (group_size) {
    const int64_t length = x.size(-1);
    view = {length, std::min(*group_size, std::max<int64_t>(1, length)), scales.numel()};
  }
  fake_quantize_into(op, view, dense, y, mask);
}

Tensor fake_quantize_per_tensor_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                     int64_t quant_min, int64_t quant_max) {
  static const auto op =
      find_operator<decltype(fake_quantize_per_tensor_cuda)>("qtoolkit::fake_quantize_per_tensor");
  const Tensor y = op.redispatch(kMeta, x, scale, zero_point, quant_min, quant_max);
  run(x, scale, zero_point, {}, {}, quant_min, quant_max, false, y, {});
  return y;
}

Tensor fake_quantize_per_channel_cuda(const Tensor& x, const Tensor& scale,
                                      const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                                      int64_t quant_max) {
  static const auto op = find_operator<decltype(fake_quantize_per_channel_cuda)>(
      "qtoolkit::fake_quantize_per_channel");
  const Tensor y = op.redispatch(kMeta, x, scale, zero_point, ch_axis, quant_min, quant_max);
  run(x, scale, zero_point, ch_axis, {}, quant_min, quant_max, false, y, {});
  return y;
}

Tensor fake_quantize_per_group_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                    int64_t group_size, int64_t quant_min, int64_t quant_max) {
  static const auto op =
      find_operator<decltype(fake_quantize_per_group_cuda)>("qtoolkit::fake_quantize_per_group");
  const Tensor y = op.redispatch(kMeta, x, scale, zero_point, group_size, quant_min, quant_max);
  run(x, scale, zero_point, {}, group_size, quant_min, quant_max, false, y, {});
  return y;
}

Tensor fake_quantize_relu_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                               int64_t quant_min, int64_t quant_max) {
  static const auto op =
      find_operator<decltype(fake_quantize_relu_cuda)>("qtoolkit::fake_quantize_relu");
  const Tensor y = op.redispatch(kMeta, x, scale, zero_point, quant_min, quant_max);
  run(x, scale, zero_point, {}, {}, quant_min, quant_max, true, y, {});
  return y;
}

TensorPair fake_quantize_mask_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                   OptionalInt ch_axis, OptionalInt group_size, int64_t quant_min,
                                   int64_t quant_max, bool relu) {
  static const auto op =
      find_operator<decltype(fake_quantize_mask_cuda)>("qtoolkit::fake_quantize_mask");
  const TensorPair result =
      op.redispatch(kMeta, x, scale, zero_point, ch_axis, group_size, quant_min, quant_max, relu);
  run(x, scale, zero_point, ch_axis, group_size, quant_min, quant_max, relu, std::get<0>(result),
      std::get<1>(result));
  return result;
}

// --- the gradient: y = grad where the mask's bit is 1, else 0 ------------------------------------

// Of any element of its size, by its bits.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    mask_gradient(const Bits* grad, const uint8_t* mask, Bits* y, int64_t count, int64_t whole) {
  constexpr int kTiles = 4 / Share<Bits>::kWords;
  constexpr int kSize = Word<Bits>::kSize;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = gridDim.x * static_cast<int64_t>(kWarps);
  const int64_t first = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  for (int64_t tile = first; tile < whole; tile += kTiles * step) {
    Share<Bits> share[kTiles];
    uint32_t bytes[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t at = tile + t * step;
      if (at < whole) {
        share[t] = load_share(grad + at * kTile, lane);
        bytes[t] = mask[at * kWarp + mask_place<Bits>(lane)];
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t at = tile + t * step;
      if (at < whole) {  // the same for the whole warp
        const uint32_t bits = byte_to_bits<Bits>(bytes[t], lane);
#pragma unroll
        for (int k = 0; k < kShare; ++k) {
          Bits& value = share[t].words[k / kSize].values[k % kSize];
          value = (bits >> k & 1u) != 0 ? value : Bits{0};
        }
#pragma unroll
        for (int w = 0; w < Share<Bits>::kWords; ++w) {
          store_word(y + at * kTile + place<Bits>(lane, w * kSize), share[t].words[w]);
        }
      }
    }
  }
  const int64_t threads = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = whole * kTile + blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
       i < count; i += threads) {
    y[i] = (mask[i >> 3] >> (i & 7) & 1) != 0 ? grad[i] : Bits{0};
  }
}

template <class Bits>
void launch_mask_gradient(const Tensor& grad, const Tensor& mask, const Tensor& y) {
  constexpr int64_t kMostBlocks = 65536;
  const int64_t count = grad.numel();
  const auto* from = const_data<Bits>(grad);
  auto* to = mutable_data<Bits>(y);
  const int64_t whole = is_aligned({from, to}) ? count / kTile : 0;
  const int64_t tiles_of_block = kWarps * 4 / Share<Bits>::kWords;
  const auto blocks = static_cast<unsigned>(
      std::min(divide_up(divide_up(count, kTile), tiles_of_block), kMostBlocks));
  mask_gradient<<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      from, const_data<uint8_t>(mask), to, count, whole);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// y may be grad. Both are dense in the order of the mask.
void apply_mask(const Tensor& grad, const Tensor& mask, const Tensor& y) {
  if (grad.numel() == 0) return;
  const Tensor bits = mask.contiguous();
  if (grad.element_size() == 2) {
    launch_mask_gradient<uint16_t>(grad, bits, y);
  } else {
    launch_mask_gradient<uint32_t>(grad, bits, y);
  }
}

Tensor fake_quantize_mask_backward_cuda(const Tensor& grad, const Tensor& mask, int64_t layout) {
  static const auto op = find_operator<decltype(fake_quantize_mask_backward_cuda)>(
      "qtoolkit::fake_quantize_mask_backward");
  const Tensor y = op.redispatch(kMeta, grad, mask, layout);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto format = format_of("fake_quantize_mask_backward", layout, grad.dim());
  apply_mask(grad.contiguous(format), mask, y);
  return y;
}

void fake_quantize_mask_backward_inplace_cuda(const Tensor& grad, const Tensor& mask,
                                              int64_t layout) {
  static const auto op = find_operator<decltype(fake_quantize_mask_backward_inplace_cuda)>(
      "qtoolkit::fake_quantize_mask_backward_");
  op.redispatch(kMeta, grad, mask, layout);
  const c10::cuda::CUDAGuard guard(grad.device());
  apply_mask(grad, mask, grad);
}

}  // namespace

void fake_quantize_into(const FakeQuantizeOp& op, const ParamView& view, const Tensor& x,
                        const Tensor& y, const Tensor& mask) {
  with_element_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    map(op, view,
        MapArgs<T>{.x = const_data<T>(x),
                   .y = mutable_data<T>(y),
                   .mask_out = mask.defined() ? mutable_data<uint8_t>(mask) : nullptr,
                   .count = x.numel()});
  });
}

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor_cuda);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel_cuda);
  m.impl("fake_quantize_per_group", fake_quantize_per_group_cuda);
  m.impl("fake_quantize_relu", fake_quantize_relu_cuda);
  m.impl("fake_quantize_mask", fake_quantize_mask_cuda);
  m.impl("fake_quantize_mask_backward", fake_quantize_mask_backward_cuda);
  m.impl("fake_quantize_mask_backward_", fake_quantize_mask_backward_inplace_cuda);
}

}  // namespace qtoolkit::ops
