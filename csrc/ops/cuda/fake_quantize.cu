// Fake-quantization of float tensors on CUDA: the CPU operators' bits. scale and zero_point are
// read on the device, so nothing waits for the GPU; their values are not checked.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "ops/checks.h"
#include "ops/layout.h"

namespace qtoolkit::ops {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 8192;  // the threads of more go round again

struct Qparams {
  const float* scale;
  const int32_t* zero_point;
  int32_t quant_min, quant_max;
};

struct Channel {
  float scale, inverse, low, high;
};

__device__ Channel channel_at(const Qparams& qparams, int64_t c) {
  const float scale = qparams.scale[c];
  const int32_t zero_point = qparams.zero_point[c];
  return {scale, __fdiv_rn(1.0f, scale), __int2float_rn(qparams.quant_min - zero_point),
          __int2float_rn(qparams.quant_max - zero_point)};
}

// See core/rounding.h. The detour over int makes -0 +0, as on CPU.
struct Forward {
  const float* x;

  __device__ float operator()(float value, const Channel& channel) const {
    if (isnan(value)) return value;
    float scaled = __fmul_rn(value, channel.inverse);
    scaled = isnan(scaled) ? 0.0f : scaled;  // 0 * Inf, where 1 / scale overflows
    scaled = fminf(fmaxf(scaled, channel.low), channel.high);
    return __fmul_rn(__int2float_rn(__float2int_rn(scaled)), channel.scale);
  }
};

// Elements [0, whole) four at a time, [whole, count) one by one; whole is a multiple of 4, and 0
// where the memory is not aligned for float4.
template <class Body>
__global__ void per_tensor_kernel(Body body, Qparams qparams, float* y, int64_t whole,
                                  int64_t count) {
  const Channel channel = channel_at(qparams, 0);
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t step = gridDim.x * static_cast<int64_t>(blockDim.x);
  for (int64_t i = first; i < whole / 4; i += step) {
    const float4 x = reinterpret_cast<const float4*>(body.x)[i];
    reinterpret_cast<float4*>(y)[i] = {body(x.x, channel), body(x.y, channel), body(x.z, channel),
                                       body(x.w, channel)};
  }
  for (int64_t i = whole + first; i < count; i += step) {
    y[i] = body(body.x[i], channel);
  }
}

// Index is uint32_t where count allows it: a 64-bit division costs more than the arithmetic here.
// count + the number of threads fits in it.
template <class Index, class Body>
__global__ void per_channel_kernel(Body body, Qparams qparams, float* y, Index channels,
                                   Index inner, Index count) {
  const Index step = gridDim.x * static_cast<Index>(blockDim.x);
  for (Index i = blockIdx.x * static_cast<Index>(blockDim.x) + threadIdx.x; i < count; i += step) {
    const Channel channel = channel_at(qparams, i / inner % channels);
    y[i] = body(body.x[i], channel);
  }
}

unsigned blocks_for(int64_t units) {
  return static_cast<unsigned>(std::min((units + kThreads - 1) / kThreads, kMostBlocks));
}

bool aligned(const float* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(float4) == 0;
}

template <class Body>
void launch(const Body& body, const Qparams& qparams, const ChannelView& view, float* y) {
  const int64_t count = view.outer * view.channels * view.inner;
  if (count == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (view.channels == 1) {
    const bool vectors = aligned(body.x) && aligned(y);
    const int64_t whole = vectors ? count - count % 4 : 0;
    const unsigned blocks = blocks_for(vectors ? (count + 3) / 4 : count);
    per_tensor_kernel<<<blocks, kThreads, 0, stream>>>(body, qparams, y, whole, count);
  } else if (count < int64_t{1} << 31) {
    per_channel_kernel<uint32_t><<<blocks_for(count), kThreads, 0, stream>>>(
        body, qparams, y, static_cast<uint32_t>(view.channels), static_cast<uint32_t>(view.inner),
        static_cast<uint32_t>(count));
  } else {
    per_channel_kernel<int64_t><<<blocks_for(count), kThreads, 0, stream>>>(
        body, qparams, y, view.channels, view.inner, count);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Arithmetic is float32; float16 and bfloat16 are converted before and after it.
Tensor dense_float(const Tensor& tensor, at::MemoryFormat format) {
  return tensor.to(at::kFloat).contiguous(format);
}

Tensor run_forward(const Tensor& x, const Qparams& qparams, const ChannelView& view) {
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor dense = dense_float(x, format);
  const Tensor y = empty_beside(x, x.sym_sizes(), at::kFloat, format);
  launch(Forward{dense.const_data_ptr<float>()}, qparams, view, y.mutable_data_ptr<float>());
  return y.to(x.scalar_type());
}

// Calls run(qparams, view) on x's device with checked arguments.
template <class Run>
Tensor with_tensor_args(const char* op, const Tensor& x, const Tensor& scale,
                        const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                        const Run& run) {
  check_float(op, "x", x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  check_qparams(op, "", scale, zero_point, x);
  const c10::cuda::CUDAGuard guard(x.device());
  return run(Qparams{scale.const_data_ptr<float>(), zero_point.const_data_ptr<int32_t>(), range.min,
                     range.max},
             ChannelView{1, 1, x.numel()});
}

template <class Run>
Tensor with_channel_args(const char* op, const Tensor& x, const Tensor& scale,
                         const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                         int64_t quant_max, const Run& run) {
  check_float(op, "x", x);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  ch_axis = check_ch_axis(op, x, ch_axis);
  check_channel_qparams(op, scale, zero_point, x, x.sym_size(ch_axis));
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor scales = scale.contiguous();
  const Tensor zero_points = zero_point.contiguous();
  return run(Qparams{scales.const_data_ptr<float>(), zero_points.const_data_ptr<int32_t>(),
                     range.min, range.max},
             channel_view(x.sizes(), ch_axis, x.suggest_memory_format()));
}

Tensor fake_quantize_per_tensor_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                     int64_t quant_min, int64_t quant_max) {
  return with_tensor_args("fake_quantize_per_tensor", x, scale, zero_point, quant_min, quant_max,
                          [&](const Qparams& qparams, const ChannelView& view) {
                            return run_forward(x, qparams, view);
                          });
}

Tensor fake_quantize_per_channel_cuda(const Tensor& x, const Tensor& scale,
                                      const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                                      int64_t quant_max) {
  return with_channel_args("fake_quantize_per_channel", x, scale, zero_point, ch_axis, quant_min,
                           quant_max, [&](const Qparams& qparams, const ChannelView& view) {
                             return run_forward(x, qparams, view);
                           });
}

}  // namespace

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor_cuda);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel_cuda);
}

}  // namespace qtoolkit::ops
