// Between float tensors and tensors of codes with one scale, on a GPU.
#include <torch/library.h>

#include "ops/cuda/codes.cuh"

namespace qtoolkit::ops {
namespace {

struct QuantizeElement {
  const float* x;
  CodesOut y;

  __device__ void operator()(int64_t i) const {
    y.data[i] = static_cast<uint8_t>(quantize_value(
        x[i], 1.0f / *y.qparams.scale, *y.qparams.zero_point, y.range.min, y.range.max));
  }
};

struct DequantizeElement {
  CodesIn x;
  float* y;

  __device__ void operator()(int64_t i) const {
    y[i] = dequantize_value(x.code(i), *x.qparams.scale, *x.qparams.zero_point);
  }
};

Tensor quantize_per_tensor_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                int64_t quant_min, int64_t quant_max) {
  static const auto op =
      find_operator<decltype(quantize_per_tensor_cuda)>("qtoolkit::quantize_per_tensor");
  const Tensor y = op.redispatch(kMeta, x, scale, zero_point, quant_min, quant_max);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.to(at::kFloat).contiguous(x.suggest_memory_format());
  const CodeRange range = check_quant_range("quantize_per_tensor", quant_min, quant_max);
  const CodesOut codes{mutable_data<uint8_t>(y), {scale, zero_point}, range};
  for_each(y.numel(), QuantizeElement{const_data<float>(dense), codes});
  return y;
}

Tensor dequantize_per_tensor_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point) {
  static const auto op =
      find_operator<decltype(dequantize_per_tensor_cuda)>("qtoolkit::dequantize_per_tensor");
  const Tensor y = op.redispatch(kMeta, x, scale, zero_point);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  for_each(y.numel(), DequantizeElement{{dense, scale, zero_point}, mutable_data<float>(y)});
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("quantize_per_tensor", quantize_per_tensor_cuda);
  m.impl("dequantize_per_tensor", dequantize_per_tensor_cuda);
}

}  // namespace qtoolkit::ops
