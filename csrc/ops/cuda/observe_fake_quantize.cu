// Moving-average observation and fake-quantization on CUDA: the state is read and written on the
// device.
#include <torch/library.h>

#include <tuple>

#include "ops/cuda/fake_quantize.cuh"
#include "ops/cuda/range.cuh"

namespace qtoolkit::ops {
namespace {

void run(const Tensor& x, const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
         const Tensor& zero_point, double averaging_constant, int64_t quant_min, int64_t quant_max,
         bool symmetric, const Tensor& y, const Tensor& mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  const RangeState state{.min_val = mutable_data<float>(min_val),
                         .max_val = mutable_data<float>(max_val),
                         .scale = mutable_data<float>(scale),
                         .zero_point = mutable_data<int32_t>(zero_point),
                         .averaging_constant = static_cast<float>(averaging_constant),
                         .symmetric = symmetric,
                         .quant_min = static_cast<int32_t>(quant_min),
                         .quant_max = static_cast<int32_t>(quant_max)};
  observe_range(dense, state);
  fake_quantize_into({.qparams = {.scale = state.scale,
                                  .zero_point = state.zero_point,
                                  .quant_min = state.quant_min,
                                  .quant_max = state.quant_max},
                      .min_val = state.min_val},
                     {}, dense, y, mask);
}

Tensor observe_fake_quantize_cuda(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
                                  const Tensor& scale, const Tensor& zero_point,
                                  double averaging_constant, int64_t quant_min, int64_t quant_max,
                                  bool symmetric) {
  static const auto op =
      find_operator<decltype(observe_fake_quantize_cuda)>("qtoolkit::observe_fake_quantize");
  const Tensor y = op.redispatch(kMeta, x, min_val, max_val, scale, zero_point, averaging_constant,
                                 quant_min, quant_max, symmetric);
  run(x, min_val, max_val, scale, zero_point, averaging_constant, quant_min, quant_max, symmetric,
      y, {});
  return y;
}

std::tuple<Tensor, Tensor> observe_fake_quantize_mask_cuda(
    const Tensor& x, const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
    const Tensor& zero_point, double averaging_constant, int64_t quant_min, int64_t quant_max,
    bool symmetric) {
  static const auto op = find_operator<decltype(observe_fake_quantize_mask_cuda)>(
      "qtoolkit::observe_fake_quantize_mask");
  const std::tuple<Tensor, Tensor> result =
      op.redispatch(kMeta, x, min_val, max_val, scale, zero_point, averaging_constant, quant_min,
                    quant_max, symmetric);
  run(x, min_val, max_val, scale, zero_point, averaging_constant, quant_min, quant_max, symmetric,
      std::get<0>(result), std::get<1>(result));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("observe_fake_quantize", observe_fake_quantize_cuda);
  m.impl("observe_fake_quantize_mask", observe_fake_quantize_mask_cuda);
}

}  // namespace qtoolkit::ops
