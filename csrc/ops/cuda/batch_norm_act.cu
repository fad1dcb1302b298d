// Training batch norm with a residual, an activation, the moving average of the range and
// fake-quantize, on CUDA; see kernels/batch_norm.h. Two passes over x, three where the range needs
// a pass of its own. Statistics are sums in double, in an order of their own that depends on shapes
// alone; given the statistics, every number has the CPU operators' bits.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "ops/batch_norm_act.h"
#include "ops/cuda/fake_quantize.cuh"
#include "ops/cuda/range.cuh"

namespace qtoolkit::ops {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Affine {
  float factor, addend;
};

// --- statistics ----------------------------------------------------------------------------------

struct StatisticsOp {
  struct Sums {
    double sum, squares;
    float minimum, maximum;  // NaN does not count, -0 is +0

    static __device__ Sums none() { return {0.0, 0.0, kInf, -kInf}; }
    __device__ void merge(const Sums& other) {
      sum = __dadd_rn(sum, other.sum);
      squares = __dadd_rn(squares, other.squares);
      minimum = fminf(minimum, other.minimum);
      maximum = fmaxf(maximum, other.maximum);
    }
  };
  struct Param {};
  static constexpr bool kTwo = false, kOut = false;

  __device__ void start() {}
  __device__ Param param(int64_t /*c*/) const { return {}; }
  __device__ void take(float x, float /*other*/, bool /*bit*/, const Param& /*param*/, Sums& sums,
                       float& /*out*/) const {
    const auto wide = static_cast<double>(x);
    const float unsigned_zero = __fadd_rn(x, 0.0f);
    sums.merge({wide, __dmul_rn(wide, wide), unsigned_zero, unsigned_zero});
  }
};

// What is known of each channel; pointers may be null where marked.
struct Channels {
  const float* weight;  // or null: 1
  const float* bias;    // or null: 0
  float* running_mean;  // or null
  float* running_var;   // or null
  double momentum, eps;
  double count;
  float* mean;
  float* invstd;
  Affine* affine;
  float* minimum;
  float* maximum;

  __device__ void write(int64_t c, double channel_mean, double variance) const {
    const double inverse = 1.0 / sqrt(variance + eps);
    mean[c] = __double2float_rn(channel_mean);
    invstd[c] = __double2float_rn(inverse);
    const double w = weight == nullptr ? 1.0 : weight[c], b = bias == nullptr ? 0.0 : bias[c];
    const float factor = __double2float_rn(w * inverse);
    affine[c] = {factor, __double2float_rn(b - channel_mean * static_cast<double>(factor))};
  }
  // As the Finish of StatisticsOp.
  __device__ void operator()(int64_t c, const StatisticsOp::Sums& sums) const {
    const double channel_mean = sums.sum / count;
    double variance = (sums.squares - channel_mean * sums.sum) / count;
    variance = variance < 0.0 ? 0.0 : variance;  // NaN stays
    if (running_mean != nullptr) {
      update(running_mean[c], channel_mean);
      update(running_var[c], variance * (count / (count - 1.0)));
    }
    minimum[c] = sums.minimum;
    maximum[c] = sums.maximum;
    write(c, channel_mean, variance);
  }

 private:
  __device__ void update(float& running, double batch) const {
    running = __double2float_rn((1.0 - momentum) * static_cast<double>(running) + momentum * batch);
  }
};

__global__ void use_running_statistics(Channels channels, int64_t count) {
  for (int64_t c = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; c < count;
       c += gridDim.x * static_cast<int64_t>(blockDim.x)) {
    channels.write(c, channels.running_mean[c], channels.running_var[c]);
  }
}

// --- elements ------------------------------------------------------------------------------------

// The activation's input and output.
struct Activation {
  const Affine* affine;
  bool residual;
  float lower, upper;

  __device__ float input(float x, float other, const Affine& channel) const {
    const float z = __fadd_rn(__fmul_rn(x, channel.factor), channel.addend);
    return residual ? __fadd_rn(z, other) : z;
  }
  __device__ float output(float z) const {
    z = z < lower ? lower : z;  // NaN stays
    return z > upper ? upper : z;
  }
};

// Extremes of each channel's results.
struct RangeOp {
  using Sums = Extremes;
  using Param = Affine;
  static constexpr bool kTwo = true, kOut = false;

  Activation activation;

  __device__ void start() {}
  __device__ Affine param(int64_t c) const { return activation.affine[c]; }
  __device__ void take(float x, float other, bool /*bit*/, const Affine& channel, Extremes& sums,
                       float& /*out*/) const {
    sums.take(activation.output(activation.input(x, other, channel)));
  }
};

struct WriteRange {
  float* minimum;
  float* maximum;
  __device__ void operator()(int64_t c, const Extremes& extremes) const {
    minimum[c] = extremes.minimum;
    maximum[c] = extremes.maximum;
  }
};

// One block: takes the extremes over all channels as those of the next batch. With `of_inputs` they
// are x's: the map to results is monotone, so it takes them to the results'.
__global__ void __launch_bounds__(kThreads)
    observe_channels(RangeState state, const float* minimum, const float* maximum, int64_t channels,
                     bool of_inputs, Activation activation) {
  Extremes extremes = Extremes::none();
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    for (const float value : {minimum[c], maximum[c]}) {
      extremes.take(of_inputs
                        ? activation.output(activation.input(value, 0.0f, activation.affine[c]))
                        : value);
    }
  }
  __shared__ alignas(16) unsigned char memory[kThreads * sizeof(Extremes)];
  auto* shared = reinterpret_cast<Extremes*>(memory);
  shared[threadIdx.x] = extremes;
  merge_in_block(shared, threadIdx.x, kThreads, 1);
  if (threadIdx.x == 0) state.observe(shared[0]);
}

struct ActivateOp {
  using Param = Affine;
  static constexpr bool kTwo = true;

  Activation activation;
  bool quantize;
  Qparams qparams;
  const float* min_val;  // or null; where it is +Inf no range is known: not quantized
  Channel channel = {};

  __device__ void start() {
    quantize = quantize && (min_val == nullptr || *min_val != kInf);
    if (quantize) channel = qparams.at(0);
  }
  __device__ Affine param(int64_t c) const { return activation.affine[c]; }
  __device__ float operator()(float x, float other, const Affine& affine, bool& bit) const {
    const float z = activation.input(x, other, affine);
    const float a = activation.output(z);
    bit = z > activation.lower && z < activation.upper;
    if (!quantize) return a;
    const Rounded rounded = round_to_code(a, channel.inverse, channel.low, channel.high);
    bit = bit && rounded.in_range;
    return isnan(a) ? a : __fmul_rn(rounded.code, channel.scale);
  }
};

// --- the operator --------------------------------------------------------------------------------

// Keeps the memory of an optional tensor of channels that may not be contiguous.
template <class T>
T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(const_cast<void*>(tensor->const_data_ptr())) : nullptr;
}

OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

Outputs batch_norm_act_cuda(const Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const OptionalTensor& residual,
                            bool training, double momentum, double eps, bool relu,
                            std::optional<double> upper, const OptionalTensor& min_val,
                            const OptionalTensor& max_val, const OptionalTensor& scale,
                            const OptionalTensor& zero_point, double averaging_constant,
                            bool symmetric, int64_t quant_min, int64_t quant_max) {
  static const auto op = find_operator<decltype(batch_norm_act_cuda)>("qtoolkit::batch_norm_act");
  const Outputs outputs =
      op.redispatch(kMeta, x, weight, bias, running_mean, running_var, residual, training, momentum,
                    eps, relu, upper, min_val, max_val, scale, zero_point, averaging_constant,
                    symmetric, quant_min, quant_max);
  const auto& [y, mean, invstd, mask] = outputs;
  const ChannelView view = batch_norm_view(x);
  const int64_t count = view.outer * view.inner;
  TORCH_CHECK_VALUE(!training || (count > 1 && x.numel() > 0),
                    "qtoolkit::batch_norm_act: needs more than one value for each channel in "
                    "training, got ",
                    describe(x));
  if (view.channels == 0) return outputs;
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();

  // Where x and the residual are of two types, float32.
  const at::ScalarType type =
      residual && residual->scalar_type() != x.scalar_type() ? at::kFloat : x.scalar_type();
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor input = x.to(type).contiguous(format);
  const Tensor added = residual ? residual->to(type).contiguous(format) : Tensor();
  const Tensor result =
      y.scalar_type() == type ? y : at::empty(y.sizes(), y.options().dtype(type), format);

  const OptionalTensor weights = dense(weight), biases = dense(bias);
  const OptionalTensor means = dense(running_mean), variances = dense(running_var);
  const auto float_options = x.options().dtype(at::kFloat);
  const Tensor affine = at::empty({view.channels, 2}, float_options);
  const Tensor extremes = at::empty({2, view.channels}, float_options);
  auto* minimum = mutable_data<float>(extremes);
  auto* maximum = minimum + view.channels;
  const Channels channels{.weight = data_or_null<float>(weights),
                          .bias = data_or_null<float>(biases),
                          .running_mean = data_or_null<float>(means),
                          .running_var = data_or_null<float>(variances),
                          .momentum = momentum,
                          .eps = eps,
                          .count = static_cast<double>(count),
                          .mean = mutable_data<float>(mean),
                          .invstd = mutable_data<float>(invstd),
                          .affine = mutable_data<Affine>(affine),
                          .minimum = minimum,
                          .maximum = maximum};
  const Activation activation{.affine = channels.affine,
                              .residual = residual.has_value(),
                              .lower = relu ? 0.0f : -kInf,
                              .upper = upper ? static_cast<float>(*upper) : kInf};
  const bool observed = scale && averaging_constant > 0 && x.numel() > 0;
  const bool range_of_statistics = training && !residual;

  if (!training) {
    const auto blocks =
        static_cast<unsigned>(std::min(divide_up(view.channels, kThreads), int64_t{65536}));
    use_running_statistics<<<blocks, kThreads, 0, stream>>>(channels, view.channels);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  with_element_type(input, [&](auto element) {
    using T = typename decltype(element)::type;
    const auto* from = const_data<T>(input);
    const auto* other = residual ? const_data<T>(added) : nullptr;
    if (training) reduce(StatisticsOp{}, view, ReduceArgs<T>{.x = from}, channels, x);
    if (observed && !range_of_statistics) {
      reduce(RangeOp{activation}, view, ReduceArgs<T>{.x = from, .other = other},
             WriteRange{minimum, maximum}, x);
    }
    Qparams qparams;
    if (scale) {
      qparams = {.scale = const_data<float>(*scale),
                 .zero_point = const_data<int32_t>(*zero_point),
                 .quant_min = static_cast<int32_t>(quant_min),
                 .quant_max = static_cast<int32_t>(quant_max)};
    }
    if (observed) {
      const RangeState state{.min_val = mutable_data<float>(*min_val),
                             .max_val = mutable_data<float>(*max_val),
                             .scale = mutable_data<float>(*scale),
                             .zero_point = mutable_data<int32_t>(*zero_point),
                             .averaging_constant = static_cast<float>(averaging_constant),
                             .symmetric = symmetric,
                             .quant_min = qparams.quant_min,
                             .quant_max = qparams.quant_max};
      observe_channels<<<1, kThreads, 0, stream>>>(state, minimum, maximum, view.channels,
                                                   range_of_statistics, activation);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    map(ActivateOp{.activation = activation,
                   .quantize = scale.has_value(),
                   .qparams = qparams,
                   .min_val = scale ? data_or_null<float>(min_val) : nullptr},
        ParamView::of(view),
        MapArgs<T>{.x = from,
                   .other = other,
                   .y = mutable_data<T>(result),
                   .mask_out = mask.numel() == 0 ? nullptr : mutable_data<uint8_t>(mask),
                   .count = x.numel()});
  });
  if (!result.is_same(y)) y.copy_(result);
  if (training && running_mean) {  // where the buffers were not contiguous
    if (!means->is_same(*running_mean)) running_mean->copy_(*means);
    if (!variances->is_same(*running_var)) running_var->copy_(*variances);
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) { m.impl("batch_norm_act", batch_norm_act_cuda); }

}  // namespace qtoolkit::ops
