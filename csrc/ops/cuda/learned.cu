// Fake-quantize with learned parameters (LSQ, LSQ+, PACT) on CUDA. Results for elements have the
// CPU operators' bits; the gradients of the parameters are sums in double, in an order of their own
// that depends on shapes alone. Values on the device are not checked.
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "ops/cuda/fake_quantize.cuh"
#include "ops/cuda/reduce.cuh"

namespace qtoolkit::ops {
namespace {

using OptionalInt = std::optional<int64_t>;
using TensorPair = std::tuple<Tensor, Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;

// [1] or [C] learned numbers with the axis of C.
ChannelView view_of(const Tensor& x, OptionalInt ch_axis) {
  if (!ch_axis) return {1, 1, x.numel()};
  const int64_t axis = *ch_axis < 0 ? *ch_axis + x.dim() : *ch_axis;
  return channel_view(x.sizes(), axis, x.suggest_memory_format());
}

void run_forward(const Tensor& x, const Qparams& qparams, const ChannelView& view,
                 const Tensor& y) {
  fake_quantize_into({.qparams = qparams}, ParamView::of(view),
                     x.contiguous(x.suggest_memory_format()), y, {});
}

// The gradients of a learned parameter; a NaN has the same bits on every device.
__device__ float gradient_of(double sum) {
  return isnan(sum) ? __int_as_float(0x7fc00000) : __double2float_rn(sum);
}
__device__ double sign_of(float learned) { return signbit(learned) ? -1.0 : 1.0; }

// reduce(op, ...) over x and grad; grad_x is dense and may be grad.
template <class Op, class Finish>
void run_backward(const Op& op, const Tensor& grad, const Tensor& x, const ChannelView& view,
                  const Tensor& grad_x, const Finish& finish) {
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor dense = x.contiguous(format), dense_grad = grad.contiguous(format);
  with_element_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    reduce(op, view,
           ReduceArgs<T>{.x = const_data<T>(dense),
                         .other = const_data<T>(dense_grad),
                         .out = mutable_data<T>(grad_x)},
           finish, x);
  });
}

// --- LSQ -----------------------------------------------------------------------------------------

// See kernels::LsqBackwardArgs.
struct LsqBackwardOp {
  struct Sums {
    double scale, outside;
    static __device__ Sums none() { return {0.0, 0.0}; }
    __device__ void merge(const Sums& other) {
      scale = __dadd_rn(scale, other.scale);
      outside = __dadd_rn(outside, other.outside);
    }
  };
  struct Param {
    float inverse, low, high;
  };
  static constexpr bool kTwo = true, kOut = true;

  Qparams qparams;

  __device__ void start() {}
  __device__ Param param(int64_t c) const {
    const Channel channel = qparams.at(c);
    return {channel.inverse, channel.low, channel.high};
  }
  __device__ void take(float x, float grad, bool /*bit*/, const Param& param, Sums& sums,
                       float& grad_x) const {
    const Rounded rounded = round_to_code(x, param.inverse, param.low, param.high);
    const bool known = !isnan(rounded.value);
    grad_x = rounded.in_range ? grad : 0.0f;
    const float slope = rounded.in_range ? __fsub_rn(rounded.code, rounded.value) : rounded.code;
    if (known) sums.scale = __dadd_rn(sums.scale, __fmul_rn(grad, slope));
    if (known && !rounded.in_range) sums.outside = __dadd_rn(sums.outside, grad);
  }
};

struct LsqFinish {
  Qparams qparams;
  double factor;
  float* grad_scale;
  float* grad_zero_point;  // or none

  __device__ void operator()(int64_t c, const LsqBackwardOp::Sums& sums) const {
    grad_scale[c] = gradient_of(sums.scale * (factor * sign_of(qparams.scale[c])));
    if (grad_zero_point == nullptr) return;
    grad_zero_point[c] = gradient_of(sums.outside * (-factor * qparams.at(c).scale));
  }
};

// Keeps what the pointers in Qparams point to.
struct LsqParameters {
  Tensor scale, zero_point;
  Qparams qparams;

  LsqParameters(const Tensor& given_scale, const OptionalTensor& given_zero_point,
                int64_t quant_min, int64_t quant_max)
      : scale(given_scale.contiguous()),
        zero_point(given_zero_point ? given_zero_point->contiguous() : Tensor()) {
    qparams = {.scale = const_data<float>(scale),
               .learned_zero_point = given_zero_point ? const_data<float>(zero_point) : nullptr,
               .learned = true,
               .quant_min = static_cast<int32_t>(quant_min),
               .quant_max = static_cast<int32_t>(quant_max)};
  }
};

Tensor fake_quantize_lsq_cuda(const Tensor& x, const Tensor& scale,
                              const OptionalTensor& zero_point, OptionalInt ch_axis,
                              int64_t quant_min, int64_t quant_max, double grad_scale) {
  static const auto op =
      find_operator<decltype(fake_quantize_lsq_cuda)>("qtoolkit::fake_quantize_lsq");
  const Tensor y =
      op.redispatch(kMeta, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  const c10::cuda::CUDAGuard guard(x.device());
  const LsqParameters parameters(scale, zero_point, quant_min, quant_max);
  run_forward(x, parameters.qparams, view_of(x, ch_axis), y);
  return y;
}

void lsq_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                  const OptionalTensor& zero_point, OptionalInt ch_axis, int64_t quant_min,
                  int64_t quant_max, double grad_scale, const Tensor& grad_x,
                  const Tensor& grad_of_scale, const Tensor& grad_of_zero_point) {
  const c10::cuda::CUDAGuard guard(x.device());
  const LsqParameters parameters(scale, zero_point, quant_min, quant_max);
  const LsqFinish finish{parameters.qparams, grad_scale, mutable_data<float>(grad_of_scale),
                         zero_point ? mutable_data<float>(grad_of_zero_point) : nullptr};
  run_backward(LsqBackwardOp{parameters.qparams}, grad, x, view_of(x, ch_axis), grad_x, finish);
}

TensorTriple fake_quantize_lsq_backward_cuda(const Tensor& grad, const Tensor& x,
                                             const Tensor& scale, const OptionalTensor& zero_point,
                                             OptionalInt ch_axis, int64_t quant_min,
                                             int64_t quant_max, double grad_scale) {
  static const auto op = find_operator<decltype(fake_quantize_lsq_backward_cuda)>(
      "qtoolkit::fake_quantize_lsq_backward");
  const TensorTriple result =
      op.redispatch(kMeta, grad, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  const auto& [grad_x, grad_of_scale, grad_of_zero_point] = result;
  lsq_backward(grad, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale, grad_x,
               grad_of_scale, grad_of_zero_point);
  return result;
}

TensorPair fake_quantize_lsq_backward_inplace_cuda(const Tensor& grad, const Tensor& x,
                                                   const Tensor& scale,
                                                   const OptionalTensor& zero_point,
                                                   OptionalInt ch_axis, int64_t quant_min,
                                                   int64_t quant_max, double grad_scale) {
  static const auto op = find_operator<decltype(fake_quantize_lsq_backward_inplace_cuda)>(
      "qtoolkit::fake_quantize_lsq_backward_");
  const TensorPair result =
      op.redispatch(kMeta, grad, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  lsq_backward(grad, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale, grad,
               std::get<0>(result), std::get<1>(result));
  return result;
}

// --- PACT ----------------------------------------------------------------------------------------

Qparams pact_qparams(const Tensor& alpha, int64_t quant_max) {
  return {.scale = const_data<float>(alpha),
          .learned = true,
          .divisor = static_cast<float>(quant_max),
          .quant_min = 0,
          .quant_max = static_cast<int32_t>(quant_max)};
}

// See kernels::PactBackwardArgs.
struct PactBackwardOp {
  struct Sums {
    double above;
    static __device__ Sums none() { return {0.0}; }
    __device__ void merge(const Sums& other) { above = __dadd_rn(above, other.above); }
  };
  struct Param {
    float alpha;
  };
  static constexpr bool kTwo = true, kOut = true;

  const float* learned;

  __device__ void start() {}
  __device__ Param param(int64_t /*c*/) const { return {fmaxf(fabsf(*learned), 0x1p-100f)}; }
  __device__ void take(float x, float grad, bool /*bit*/, const Param& param, Sums& sums,
                       float& grad_x) const {
    grad_x = x >= 0.0f && x < param.alpha ? grad : 0.0f;
    if (x >= param.alpha) sums.above = __dadd_rn(sums.above, grad);
  }
};

struct PactFinish {
  const float* learned;
  float* grad_alpha;
  __device__ void operator()(int64_t /*c*/, const PactBackwardOp::Sums& sums) const {
    *grad_alpha = gradient_of(sums.above * sign_of(*learned));
  }
};

Tensor fake_quantize_pact_cuda(const Tensor& x, const Tensor& alpha, int64_t quant_max) {
  static const auto op =
      find_operator<decltype(fake_quantize_pact_cuda)>("qtoolkit::fake_quantize_pact");
  const Tensor y = op.redispatch(kMeta, x, alpha, quant_max);
  const c10::cuda::CUDAGuard guard(x.device());
  run_forward(x, pact_qparams(alpha, quant_max), view_of(x, {}), y);
  return y;
}

void pact_backward(const Tensor& grad, const Tensor& x, const Tensor& alpha, const Tensor& grad_x,
                   const Tensor& grad_alpha) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto* learned = const_data<float>(alpha);
  run_backward(PactBackwardOp{learned}, grad, x, view_of(x, {}), grad_x,
               PactFinish{learned, mutable_data<float>(grad_alpha)});
}

TensorPair fake_quantize_pact_backward_cuda(const Tensor& grad, const Tensor& x,
                                            const Tensor& alpha, int64_t quant_max) {
  static const auto op = find_operator<decltype(fake_quantize_pact_backward_cuda)>(
      "qtoolkit::fake_quantize_pact_backward");
  const TensorPair result = op.redispatch(kMeta, grad, x, alpha, quant_max);
  pact_backward(grad, x, alpha, std::get<0>(result), std::get<1>(result));
  return result;
}

Tensor fake_quantize_pact_backward_inplace_cuda(const Tensor& grad, const Tensor& x,
                                                const Tensor& alpha, int64_t quant_max) {
  static const auto op = find_operator<decltype(fake_quantize_pact_backward_inplace_cuda)>(
      "qtoolkit::fake_quantize_pact_backward_");
  const Tensor grad_alpha = op.redispatch(kMeta, grad, x, alpha, quant_max);
  pact_backward(grad, x, alpha, grad, grad_alpha);
  return grad_alpha;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("fake_quantize_lsq", fake_quantize_lsq_cuda);
  m.impl("fake_quantize_lsq_backward", fake_quantize_lsq_backward_cuda);
  m.impl("fake_quantize_lsq_backward_", fake_quantize_lsq_backward_inplace_cuda);
  m.impl("fake_quantize_pact", fake_quantize_pact_cuda);
  m.impl("fake_quantize_pact_backward", fake_quantize_pact_backward_cuda);
  m.impl("fake_quantize_pact_backward_", fake_quantize_pact_backward_inplace_cuda);
}

}  // namespace qtoolkit::ops
