// Addition of two tensors of codes on a GPU.
#include <torch/library.h>

#include "ops/cuda/codes.cuh"

namespace qtoolkit::ops {
namespace {

struct AddElement {
  CodesIn a, b;
  CodesOut y;
  Strides<3> places;  // of a, b and y

  __device__ void operator()(int64_t i) const {
    int64_t at[3];
    places.offsets(i, at);
    const float y_scale = *y.qparams.scale;
    const int32_t a_steps = a.code(at[0]) - *a.qparams.zero_point;
    const int32_t b_steps = b.code(at[1]) - *b.qparams.zero_point;
    y.store(at[2], static_cast<float>(a_steps) * quotient(*a.qparams.scale, y_scale) +
                       static_cast<float>(b_steps) * quotient(*b.qparams.scale, y_scale));
  }
};

Tensor add_cuda(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point, const Tensor& b,
                const Tensor& b_scale, const Tensor& b_zero_point, const Tensor& y_scale,
                const Tensor& y_zero_point, int64_t quant_min, int64_t quant_max, bool relu) {
  static const auto op = find_operator<decltype(add_cuda)>("qtoolkit::add");
  const Tensor y = op.redispatch(kMeta, a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale,
                                 y_zero_point, quant_min, quant_max, relu);
  const c10::cuda::CUDAGuard guard(a.device());
  const Tensor left = a.expand(y.sizes()), right = b.expand(y.sizes());
  AddElement element{{left, a_scale, a_zero_point},
                     {right, b_scale, b_zero_point},
                     {mutable_data<uint8_t>(y),
                      {y_scale, y_zero_point},
                      check_quant_range("add", quant_min, quant_max),
                      relu},
                     {}};
  if (y.numel() > 0) {
    for (int64_t d = 0; d < y.dim(); ++d) {
      element.places.add(y.size(d), {left.stride(d), right.stride(d), y.stride(d)});
    }
  }
  for_each(y.numel(), element);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) { m.impl("add", add_cuda); }

}  // namespace qtoolkit::ops
