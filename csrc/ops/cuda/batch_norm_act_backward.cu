// The gradient of the fused training batch norm on CUDA (Ioffe & Szegedy 2015, section 3): a pass
// for the sums and one for the gradient of x.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/batch_norm_act.h"
#include "ops/cuda/map.cuh"
#include "ops/cuda/reduce.cuh"

namespace qtoolkit::ops {
namespace {

// With dz = gradient where the mask's bit is set, else 0; `other` is the gradient.
struct SumsOp {
  struct Sums {
    double dz, products;  // products with x
    static __device__ Sums none() { return {0.0, 0.0}; }
    __device__ void merge(const Sums& other) {
      dz = __dadd_rn(dz, other.dz);
      products = __dadd_rn(products, other.products);
    }
  };
  struct Param {};
  static constexpr bool kTwo = true, kOut = true;

  __device__ void start() {}
  __device__ Param param(int64_t /*c*/) const { return {}; }
  __device__ void take(float x, float grad, bool bit, const Param& /*param*/, Sums& sums,
                       float& out) const {
    const float dz = bit ? grad : 0.0f;
    out = dz;
    sums.merge({dz, __dmul_rn(static_cast<double>(dz), static_cast<double>(x))});
  }
};

// grad_x = (dz * factor + (x - mean) * slope) + addend
struct alignas(16) Coefficients {
  float factor, mean, slope, addend;
};

struct Channels {
  const float* weight;  // or null: 1
  const float* mean;
  const float* invstd;
  double count;
  float* grad_weight;  // or null
  float* grad_bias;    // or null
  Coefficients* coefficients;

  __device__ double factor(int64_t c) const {
    const double w = weight == nullptr ? 1.0 : weight[c];
    return w * static_cast<double>(invstd[c]);
  }
  // As the Finish of SumsOp.
  __device__ void operator()(int64_t c, const SumsOp::Sums& sums) const {
    const double center = mean[c], inverse = invstd[c], scaled = factor(c);
    const double normalized = (sums.products - center * sums.dz) * inverse;
    if (grad_weight != nullptr) grad_weight[c] = __double2float_rn(normalized);
    if (grad_bias != nullptr) grad_bias[c] = __double2float_rn(sums.dz);
    coefficients[c] = {__double2float_rn(scaled), mean[c],
                       __double2float_rn(-scaled * inverse * normalized / count),
                       __double2float_rn(-scaled * sums.dz / count)};
  }
};

__global__ void write_factors(Channels channels, int64_t count) {
  for (int64_t c = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; c < count;
       c += gridDim.x * static_cast<int64_t>(blockDim.x)) {
    channels.coefficients[c] = {__double2float_rn(channels.factor(c)), 0.0f, 0.0f, 0.0f};
  }
}

// `x` is the gradient and `other` the batch norm's input.
struct GradientOp {
  using Param = Coefficients;
  static constexpr bool kTwo = true;

  const Coefficients* coefficients;
  bool training;

  __device__ void start() {}
  __device__ Coefficients param(int64_t c) const { return coefficients[c]; }
  __device__ float operator()(float grad, float x, const Coefficients& channel, bool& bit) const {
    const float scaled = __fmul_rn(bit ? grad : 0.0f, channel.factor);
    if (!training) return scaled;
    const float through_statistics = __fmul_rn(__fsub_rn(x, channel.mean), channel.slope);
    return __fadd_rn(__fadd_rn(scaled, through_statistics), channel.addend);
  }
};

// The result itself, or one of another type to be copied into it.
Tensor of_type(const Tensor& result, at::ScalarType type, at::MemoryFormat format) {
  if (result.scalar_type() == type) return result;
  return at::empty(result.sizes(), result.options().dtype(type), format);
}

BatchNormGradients batch_norm_act_backward_cuda(const Tensor& grad, const Tensor& x,
                                                const OptionalTensor& weight, const Tensor& mean,
                                                const Tensor& invstd, const Tensor& mask,
                                                bool training, std::array<bool, 4> output_mask) {
  static const auto op =
      find_operator<decltype(batch_norm_act_backward_cuda)>("qtoolkit::batch_norm_act_backward");
  const BatchNormGradients result =
      op.redispatch(kMeta, grad, x, weight, mean, invstd, mask, training, output_mask);
  const auto& [grad_x, grad_weight, grad_bias, grad_residual] = result;
  const auto [want_x, want_weight, want_bias, want_residual] = output_mask;
  const ChannelView view = batch_norm_view(x);
  if (view.channels == 0) return result;
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();

  // Where x and the gradient are of two types, float32.
  const at::ScalarType type = grad.scalar_type() == x.scalar_type() ? x.scalar_type() : at::kFloat;
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor input = x.to(type).contiguous(format), gradient = grad.to(type).contiguous(format);
  const Tensor to_x = want_x ? of_type(grad_x, type, format) : Tensor();
  const Tensor to_residual = want_residual ? of_type(grad_residual, type, format) : Tensor();

  const Tensor weights = weight ? weight->contiguous() : Tensor();
  const Tensor means = mean.contiguous(), invstds = invstd.contiguous(), bits = mask.contiguous();
  const Tensor coefficients = at::empty({view.channels, 4}, x.options().dtype(at::kFloat));
  const Channels channels{.weight = weight ? const_data<float>(weights) : nullptr,
                          .mean = const_data<float>(means),
                          .invstd = const_data<float>(invstds),
                          .count = static_cast<double>(view.outer * view.inner),
                          .grad_weight = want_weight ? mutable_data<float>(grad_weight) : nullptr,
                          .grad_bias = want_bias ? mutable_data<float>(grad_bias) : nullptr,
                          .coefficients = mutable_data<Coefficients>(coefficients)};
  const uint8_t* mask_data = mask.numel() == 0 ? nullptr : const_data<uint8_t>(bits);

  with_element_type(input, [&](auto element) {
    using T = typename decltype(element)::type;
    if (want_weight || want_bias || want_residual || (training && want_x)) {
      reduce(SumsOp{}, view,
             ReduceArgs<T>{.x = const_data<T>(input),
                           .other = const_data<T>(gradient),
                           .out = want_residual ? mutable_data<T>(to_residual) : nullptr,
                           .mask = mask_data},
             channels, x);
    } else {
      const auto blocks =
          static_cast<unsigned>(std::min(divide_up(view.channels, kThreads), int64_t{65536}));
      write_factors<<<blocks, kThreads, 0, stream>>>(channels, view.channels);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    if (!want_x) return;
    map(GradientOp{channels.coefficients, training}, ParamView::of(view),
        MapArgs<T>{.x = const_data<T>(gradient),
                   .other = training ? const_data<T>(input) : nullptr,
                   .y = mutable_data<T>(to_x),
                   .mask_in = mask_data,
                   .count = x.numel()});
  });
  if (want_x && !to_x.is_same(grad_x)) grad_x.copy_(to_x);
  if (want_residual && !to_residual.is_same(grad_residual)) grad_residual.copy_(to_residual);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("batch_norm_act_backward", batch_norm_act_backward_cuda);
}

}  // namespace qtoolkit::ops
