// Mean and sum of 8-bit codes over dimensions, on a GPU.
#include <torch/library.h>

#include <limits>
#include <vector>

#include "ops/cuda/codes.cuh"

namespace qtoolkit::ops {
namespace {

// A thread sums what one output needs.
struct MeanElement {
  CodesIn x;
  CodesOut y;
  Strides<2> kept;    // of x and y
  Strides<1> summed;  // of x
  int64_t count;
  double divisor;

  __device__ void operator()(int64_t i) const {
    int64_t at[2];
    kept.offsets(i, at);
    const int32_t zero_point = *x.qparams.zero_point;
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      int64_t step[1];
      summed.offsets(k, step);
      sum += x.code(at[0] + step[0]) - zero_point;
    }
    const double ratio = static_cast<double>(*x.qparams.scale) / *y.qparams.scale;
    y.store(at[1], static_cast<float>(sum) * static_cast<float>(ratio / divisor));
  }
};

Tensor reduce(const char* name, bool divides, const Tensor& x, const Tensor& y,
              const Tensor& x_scale, const Tensor& x_zero_point, at::IntArrayRef dim, bool keepdim,
              const Tensor& y_scale, const Tensor& y_zero_point, int64_t quant_min,
              int64_t quant_max) {
  std::vector<bool> reduced(static_cast<size_t>(x.dim()), false);
  for (int64_t d : dim) reduced[static_cast<size_t>(d < 0 ? d + x.dim() : d)] = true;
  MeanElement element{{x, x_scale, x_zero_point},
                      {mutable_data<uint8_t>(y),
                       {y_scale, y_zero_point},
                       check_quant_range(name, quant_min, quant_max)},
                      {},
                      {},
                      1,
                      1.0};
  for (int64_t d = 0, to = 0; d < x.dim(); ++d) {
    if (reduced[static_cast<size_t>(d)]) {
      element.summed.add(x.size(d), {x.stride(d)});
      to += keepdim ? 1 : 0;
    } else {
      element.kept.add(x.size(d), {x.stride(d), y.stride(to++)});
    }
  }
  element.count = element.summed.count();
  TORCH_CHECK_VALUE(element.count <= std::numeric_limits<int32_t>::max() / 255, "qtoolkit::", name,
                    ": ", element.count, " codes could overflow the int32 sum");
  if (divides) element.divisor = static_cast<double>(element.count);
  const c10::cuda::CUDAGuard guard(x.device());
  for_each(y.numel(), element);
  return y;
}

Tensor mean_cuda(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                 at::IntArrayRef dim, bool keepdim, const Tensor& y_scale,
                 const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  static const auto op = find_operator<decltype(mean_cuda)>("qtoolkit::mean");
  const Tensor y = op.redispatch(kMeta, x, x_scale, x_zero_point, dim, keepdim, y_scale,
                                 y_zero_point, quant_min, quant_max);
  return reduce("mean", true, x, y, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point,
                quant_min, quant_max);
}

Tensor sum_cuda(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                at::IntArrayRef dim, bool keepdim, const Tensor& y_scale,
                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max) {
  static const auto op = find_operator<decltype(sum_cuda)>("qtoolkit::sum");
  const Tensor y = op.redispatch(kMeta, x, x_scale, x_zero_point, dim, keepdim, y_scale,
                                 y_zero_point, quant_min, quant_max);
  return reduce("sum", false, x, y, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point,
                quant_min, quant_max);
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("mean", mean_cuda);
  m.impl("sum", sum_cuda);
}

}  // namespace qtoolkit::ops
