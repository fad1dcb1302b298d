// Fake-quantize to few values on CUDA: ternary, binary, small floats and blocks of small floats.
// The CPU operators' bits; see kernels/low_bit.h. The values of scales are not checked.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cfloat>
#include <optional>
#include <string_view>
#include <tuple>

#include "ops/checks.h"
#include "ops/cuda/map.cuh"
#include "ops/cuda/reduce.cuh"

namespace qtoolkit::ops {
namespace {

using OptionalInt = std::optional<int64_t>;
using TensorPair = std::tuple<Tensor, Tensor>;

// y = op(x) with parameters of one element or one for each channel; the mask may be undefined.
template <class Op>
void run(const Op& op, const Tensor& x, OptionalInt ch_axis, const Tensor& y, const Tensor& mask) {
  const at::MemoryFormat format = x.suggest_memory_format();
  ParamView view;
  if (ch_axis) {
    const int64_t axis = *ch_axis < 0 ? *ch_axis + x.dim() : *ch_axis;
    view = ParamView::of(channel_view(x.sizes(), axis, format));
  }
  const Tensor dense = x.contiguous(format);
  with_element_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    map(op, view,
        MapArgs<T>{.x = const_data<T>(dense),
                   .y = mutable_data<T>(y),
                   .mask_out = mask.defined() ? mutable_data<uint8_t>(mask) : nullptr,
                   .count = x.numel()});
  });
}

// --- ternary and binary --------------------------------------------------------------------------

struct SignOp {
  struct Param {
    float scale, threshold;
  };
  static constexpr bool kTwo = false;

  const float* scale;
  const float* threshold;  // or none: binary
  float clip;

  __device__ void start() {}
  __device__ Param param(int64_t c) const {
    return {scale[c], threshold == nullptr ? 0.0f : threshold[c]};
  }
  __device__ float operator()(float x, float /*other*/, const Param& param, bool& bit) const {
    bit = fabsf(x) <= clip;
    const float ternary = fabsf(x) > param.threshold ? copysignf(param.scale, x) : 0.0f;
    const float binary = x >= 0.0f ? param.scale : -param.scale;
    return isnan(x) ? x : threshold == nullptr ? binary : ternary;
  }
};

Tensor fake_quantize_ternary_cuda(const Tensor& x, const Tensor& scale, const Tensor& threshold,
                                  OptionalInt ch_axis) {
  static const auto op =
      find_operator<decltype(fake_quantize_ternary_cuda)>("qtoolkit::fake_quantize_ternary");
  const Tensor y = op.redispatch(kMeta, x, scale, threshold, ch_axis);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor scales = scale.contiguous(), thresholds = threshold.contiguous();
  run(SignOp{const_data<float>(scales), const_data<float>(thresholds), kInf}, x, ch_axis, y, {});
  return y;
}

void run_binary(const Tensor& x, const Tensor& scale, OptionalInt ch_axis, double clip,
                const Tensor& y, const Tensor& mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor scales = scale.contiguous();
  run(SignOp{const_data<float>(scales), nullptr, static_cast<float>(clip)}, x, ch_axis, y, mask);
}

Tensor fake_quantize_binary_cuda(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                 double clip) {
  static const auto op =
      find_operator<decltype(fake_quantize_binary_cuda)>("qtoolkit::fake_quantize_binary");
  const Tensor y = op.redispatch(kMeta, x, scale, ch_axis, clip);
  run_binary(x, scale, ch_axis, clip, y, {});
  return y;
}

TensorPair fake_quantize_binary_mask_cuda(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                          double clip) {
  static const auto op = find_operator<decltype(fake_quantize_binary_mask_cuda)>(
      "qtoolkit::fake_quantize_binary_mask");
  const TensorPair result = op.redispatch(kMeta, x, scale, ch_axis, clip);
  run_binary(x, scale, ch_axis, clip, std::get<0>(result), std::get<1>(result));
  return result;
}

// --- small floats --------------------------------------------------------------------------------

// 2^exponent, exponent in [-127, 127].
__device__ float power_of_two(int exponent) {
  return __int_as_float(exponent == -127 ? 1 << 22 : (exponent + 127) << 23);
}

// See kernels::FloatFormat.
struct FloatFormat {
  int mantissa_bits, min_exponent;
  float max_value;

  FloatFormat(int64_t given_mantissa_bits, int64_t given_min_exponent, double given_max_value)
      : mantissa_bits(static_cast<int>(given_mantissa_bits)),
        min_exponent(static_cast<int>(given_min_exponent)),
        max_value(static_cast<float>(given_max_value)) {}

  // The number nearest to v, which is not NaN; every step but the rounding is exact.
  __device__ float nearest(float v) const {
    const float size = fminf(fabsf(v), max_value);
    const int own = (__float_as_int(size) >> 23) - 127;  // too small for a subnormal one, as it may
    const int exponent = own < min_exponent ? min_exponent : own;
    const float mantissa = __fmul_rn(size, power_of_two(-exponent));  // in [0, 2)
    // Numbers from `whole` on are multiples of 2^-mantissa_bits.
    const float whole = power_of_two(23 - mantissa_bits);
    const float rounded = __fsub_rn(__fadd_rn(mantissa, whole), whole);
    return copysignf(__fmul_rn(rounded, power_of_two(exponent)), v);
  }
};

// x * inverse, where 0 times infinity is 0 with the sign of x, which is not NaN.
__device__ float product(float x, float inverse) {
  const float v = __fmul_rn(x, inverse);
  return isnan(v) ? copysignf(0.0f, x) : v;
}

struct FloatOp {
  struct Param {
    float scale, inverse;
  };
  static constexpr bool kTwo = false;

  const float* scale;
  FloatFormat format;

  __device__ void start() {}
  __device__ Param param(int64_t c) const { return {scale[c], __fdiv_rn(1.0f, scale[c])}; }
  __device__ float operator()(float x, float /*other*/, const Param& param, bool& bit) const {
    const float v = product(x, param.inverse);
    bit = !isnan(x) && fabsf(v) <= format.max_value;
    return isnan(x) ? x : __fmul_rn(format.nearest(v), param.scale);
  }
};

void run_float(const Tensor& x, const Tensor& scale, OptionalInt ch_axis, const FloatFormat& format,
               const Tensor& y, const Tensor& mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor scales = scale.contiguous();
  run(FloatOp{const_data<float>(scales), format}, x, ch_axis, y, mask);
}

Tensor fake_quantize_float_cuda(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                int64_t mantissa_bits, int64_t min_exponent, double max_value) {
  static const auto op =
      find_operator<decltype(fake_quantize_float_cuda)>("qtoolkit::fake_quantize_float");
  const Tensor y = op.redispatch(kMeta, x, scale, ch_axis, mantissa_bits, min_exponent, max_value);
  run_float(x, scale, ch_axis, {mantissa_bits, min_exponent, max_value}, y, {});
  return y;
}

TensorPair fake_quantize_float_mask_cuda(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                         int64_t mantissa_bits, int64_t min_exponent,
                                         double max_value) {
  static const auto op =
      find_operator<decltype(fake_quantize_float_mask_cuda)>("qtoolkit::fake_quantize_float_mask");
  const TensorPair result =
      op.redispatch(kMeta, x, scale, ch_axis, mantissa_bits, min_exponent, max_value);
  run_float(x, scale, ch_axis, {mantissa_bits, min_exponent, max_value}, std::get<0>(result),
            std::get<1>(result));
  return result;
}

// --- blocks of small floats ----------------------------------------------------------------------

constexpr float kLargestE4m3 = 448.0f;

// The largest |x| that is not NaN, as the scale of a whole tensor.
struct LargestOp {
  struct Sums {
    float largest;
    static __device__ Sums none() { return {0.0f}; }
    __device__ void merge(const Sums& other) { largest = fmaxf(largest, other.largest); }
  };
  struct Param {};
  static constexpr bool kTwo = false, kOut = false;

  __device__ void start() {}
  __device__ Param param(int64_t /*c*/) const { return {}; }
  __device__ void take(float x, float /*other*/, bool /*bit*/, const Param& /*param*/, Sums& sums,
                       float& /*out*/) const {
    sums.largest = fmaxf(sums.largest, fabsf(x));
  }
};

struct WriteTensorScale {
  float max_value;
  float* tensor_scale;
  __device__ void operator()(int64_t /*c*/, const LargestOp::Sums& sums) const {
    const float scale = __fdiv_rn(fminf(sums.largest, FLT_MAX), __fmul_rn(kLargestE4m3, max_value));
    *tensor_scale = sums.largest == 0.0f ? 1.0f : fmaxf(scale, FLT_MIN);
  }
};

struct BlockFormat {
  FloatFormat elements, scales;  // scales: under a tensor_scale
  const float* tensor_scale;     // or none: powers of two

  __device__ float scale_of(float largest) const {
    largest = fminf(largest, FLT_MAX);
    if (tensor_scale != nullptr) {
      const float scale = __fdiv_rn(__fdiv_rn(largest, elements.max_value), *tensor_scale);
      return __fmul_rn(scales.nearest(scale), *tensor_scale);
    }
    if (largest == 0.0f) return power_of_two(-127);
    const int exponent = ilogbf(largest) - ilogbf(elements.max_value);
    return power_of_two(exponent < -127 ? -127 : exponent > 127 ? 127 : exponent);
  }
  __device__ static float inverse_of(float scale) {
    return scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
  }
  __device__ float quantize(float x, float scale, float inverse) const {
    return isnan(x) ? x : __fmul_rn(elements.nearest(product(x, inverse)), scale);
  }
};

// The largest value of `lanes` neighbouring lanes, a power of two. All lanes call.
__device__ float largest_of(float value, int lanes) {
  for (int step = 1; step < lanes; step *= 2) {
    const auto other = __shfl_xor_sync(0xffffffffu, __float_as_uint(value), step);
    value = fmaxf(value, __uint_as_float(other));
  }
  return value;
}

// Blocks that are 1, 2, 4 ... 32 words, each in as many neighbouring lanes. Words from `count` on
// do not exist.
template <class T>
__global__ void __launch_bounds__(kThreads)
    blocks_of_words(BlockFormat format, const T* x, T* y, int lanes, int64_t count) {
  constexpr int kSize = Word<T>::kSize, kInFlight = 2;
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  // Whole warps go on together, as their lanes exchange values.
  for (int64_t word = first; word - threadIdx.x % kWarp < count; word += kInFlight * step) {
    Word<T> words[kInFlight];
#pragma unroll
    for (int w = 0; w < kInFlight; ++w) {
      const int64_t at = word + w * step;
      words[w] = {};
      if (at < count) words[w] = load_word(x + at * kSize);
    }
#pragma unroll
    for (int w = 0; w < kInFlight; ++w) {
      const int64_t at = word + w * step;
      float values[kSize], largest = 0.0f;
      unpack(words[w], values);
#pragma unroll
      for (int k = 0; k < kSize; ++k) largest = fmaxf(largest, fabsf(values[k]));
      const float scale = format.scale_of(largest_of(largest, lanes));
      const float inverse = BlockFormat::inverse_of(scale);
#pragma unroll
      for (int k = 0; k < kSize; ++k) values[k] = format.quantize(values[k], scale, inverse);
      if (at < count) store_word(y + at * kSize, pack<T>(values));
    }
  }
}

// Any blocks, one warp each: rows of `length` elements in blocks of `size`.
template <class T>
__global__ void __launch_bounds__(kThreads)
    blocks_of_elements(BlockFormat format, const T* x, T* y, int64_t length, int64_t size,
                       Divider blocks_in_row, int64_t count) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = gridDim.x * static_cast<int64_t>(kWarps);
  for (int64_t block = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
       block < count; block += step) {
    const int64_t row = blocks_in_row.divide(block);
    const int64_t in_row = (block - row * blocks_in_row.divisor()) * size;
    const int64_t begin = row * length + in_row;
    const int64_t end = begin + (length - in_row < size ? length - in_row : size);
    float largest = 0.0f;
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      largest = fmaxf(largest, fabsf(static_cast<float>(x[i])));
    }
    const float scale = format.scale_of(largest_of(largest, kWarp));
    const float inverse = BlockFormat::inverse_of(scale);
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      y[i] = static_cast<T>(format.quantize(static_cast<float>(x[i]), scale, inverse));
    }
  }
}

template <class T>
void launch_blocks(const BlockFormat& format, const Tensor& x, const Tensor& y, int64_t size) {
  constexpr int64_t kMostBlocks = 65536;  // the threads of more go round again
  constexpr int kSize = Word<T>::kSize;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto* from = const_data<T>(x);
  auto* to = mutable_data<T>(y);
  const int64_t length = x.size(-1), lanes = size / kSize;
  const bool whole_words = size % kSize == 0 && lanes <= kWarp && (lanes & (lanes - 1)) == 0 &&
                           length % size == 0 && is_aligned({from, to});
  if (whole_words) {
    const int64_t words = x.numel() / kSize;
    const auto blocks =
        static_cast<unsigned>(std::min(divide_up(words, 2 * kThreads), kMostBlocks));
    blocks_of_words<<<blocks, kThreads, 0, stream>>>(format, from, to, static_cast<int>(lanes),
                                                     words);
  } else {
    const int64_t in_row = divide_up(length, size), count = x.numel() / length * in_row;
    const auto blocks = static_cast<unsigned>(std::min(divide_up(count, kWarps), kMostBlocks));
    blocks_of_elements<<<blocks, kThreads, 0, stream>>>(format, from, to, length, size,
                                                        Divider(in_row, count), count);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor fake_quantize_block_float_cuda(const Tensor& x, const OptionalTensor& tensor_scale,
                                      int64_t block_size, int64_t mantissa_bits,
                                      int64_t min_exponent, double max_value,
                                      std::string_view scale_format) {
  static const auto op = find_operator<decltype(fake_quantize_block_float_cuda)>(
      "qtoolkit::fake_quantize_block_float");
  const Tensor y = op.redispatch(kMeta, x, tensor_scale, block_size, mantissa_bits, min_exponent,
                                 max_value, scale_format);
  if (x.numel() == 0) return y;
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous();
  Tensor scale;
  if (tensor_scale) {
    scale = tensor_scale->contiguous();
  } else if (scale_format == "e4m3") {
    scale = at::empty({1}, x.options().dtype(at::kFloat));
  }
  const BlockFormat format{.elements = {mantissa_bits, min_exponent, max_value},
                           .scales = {3, -6, kLargestE4m3},
                           .tensor_scale = scale.defined() ? const_data<float>(scale) : nullptr};
  with_element_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    if (scale.defined() && !tensor_scale) {
      reduce(LargestOp{}, ChannelView{1, 1, x.numel()}, ReduceArgs<T>{.x = const_data<T>(dense)},
             WriteTensorScale{format.elements.max_value, mutable_data<float>(scale)}, x);
    }
    launch_blocks<T>(format, dense, y, block_size);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("fake_quantize_ternary", fake_quantize_ternary_cuda);
  m.impl("fake_quantize_binary", fake_quantize_binary_cuda);
  m.impl("fake_quantize_binary_mask", fake_quantize_binary_mask_cuda);
  m.impl("fake_quantize_float", fake_quantize_float_cuda);
  m.impl("fake_quantize_float_mask", fake_quantize_float_mask_cuda);
  m.impl("fake_quantize_block_float", fake_quantize_block_float_cuda);
}

}  // namespace qtoolkit::ops
