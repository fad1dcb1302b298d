// Convolution and linear layers of 8-bit codes on tensor cores, with the bits of the CPU's kernels.
// What is multiplied where is in kernels/conv2d_gemm.h, which the host tests.
#pragma once

#include <ATen/ops/empty.h>

#include "kernels/conv2d_gemm.h"
#include "ops/cuda/codes.cuh"

namespace qtoolkit::ops {

namespace gemm = kernels::gemm;

struct ConvOperands {
  const uint8_t* x = nullptr;
  bool x_signed = false;
  const int8_t* weight = nullptr;
  const float* weight_scale = nullptr;
  bool scale_per_channel = false;
  const int32_t* bias = nullptr;  // or none
  const uint8_t* residual = nullptr;
  bool residual_signed = false;
  DeviceQParams x_qparams, y_qparams, residual_qparams;
  CodeRange range;
  bool relu = false;
  void* y = nullptr;  // codes, or float32 without y_qparams
  // What a channel's sum needs, computed by channel_terms.
  int32_t* offset = nullptr;
  float* multiplier = nullptr;
};

__device__ inline gemm::Epilogue epilogue_of(const ConvOperands& o) {
  gemm::Epilogue result;
  result.float_output = o.y_qparams.scale == nullptr;
  result.relu = result.float_output && o.relu;
  if (result.float_output) return result;
  result.zero_point = *o.y_qparams.zero_point;
  result.lo = relu_bound(o.range.min, result.zero_point, o.relu);
  result.hi = o.range.max;
  if (o.residual == nullptr) return result;
  result.residual_signed = o.residual_signed;
  result.residual_zero_point = *o.residual_qparams.zero_point;
  result.residual_multiplier = quotient(*o.residual_qparams.scale, *o.y_qparams.scale);
  return result;
}

// Writes the output of a sum; the offset is in it.
__device__ inline void finish(const ConvOperands& o, const gemm::Epilogue& epilogue, int64_t index,
                              int64_t channel, int32_t acc) {
  const float multiplier = o.multiplier[channel];
  if (epilogue.float_output) {
    static_cast<float*>(o.y)[index] = epilogue.real(acc, multiplier);
    return;
  }
  const uint8_t* const residual = o.residual == nullptr ? nullptr : o.residual + index;
  static_cast<uint8_t*>(o.y)[index] = epilogue.code(acc, multiplier, residual);
}

__device__ inline int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

// offset[c] = bias[c] - x_zero_point * sum(weight[c]), where `takes_zero_point` (else the caller
// takes it off), and multiplier[c]. A warp computes a channel.
static __global__ void channel_terms(ConvOperands o, int64_t channels, int64_t depth,
                                     bool takes_zero_point) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (channel >= channels) return;
  const int lane = threadIdx.x % kWarp;
  int32_t sum = 0;
  for (int64_t k = lane; takes_zero_point && k < depth; k += kWarp) {
    sum += o.weight[channel * depth + k];
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (lane != 0) return;
  const auto bias = static_cast<uint32_t>(o.bias == nullptr ? 0 : o.bias[channel]);
  const auto zero_point = static_cast<uint32_t>(*o.x_qparams.zero_point);
  o.offset[channel] = static_cast<int32_t>(bias - zero_point * static_cast<uint32_t>(sum));
  const double y_scale =
      o.y_qparams.scale == nullptr ? 1.0 : static_cast<double>(*o.y_qparams.scale);
  const float weight_scale = o.weight_scale[o.scale_per_channel ? channel : 0];
  o.multiplier[channel] =
      static_cast<float>(static_cast<double>(*o.x_qparams.scale) * weight_scale / y_scale);
}

// sums += codes (unsigned or signed) * weights, 4 bytes of each.
template <bool kSigned>
__device__ int32_t dot4(uint32_t codes, uint32_t weights, int32_t sum) {
  if constexpr (kSigned) {
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(codes), "r"(weights), "r"(sum));
  } else {
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(codes), "r"(weights), "r"(sum));
  }
  return sum;
}

// One product of 16 x 8 sums and kDepth bytes, of tiles in shared memory. All lanes of a warp call.
template <bool kSigned>
__device__ void multiply(int32_t (&sums)[4], const uint8_t* codes, const uint8_t* weights,
                         int first_row, int first_column, int lane) {
  const auto word = [](const uint8_t* tile, int byte) {
    return *reinterpret_cast<const uint32_t*>(tile + byte);
  };
#if __CUDA_ARCH__ >= 800
  uint32_t a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = word(codes, gemm::codes_word(first_row, lane, i));
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = word(weights, gemm::weights_word(first_column, lane, i));
  if constexpr (kSigned) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint8_t* const row = codes + gemm::sum_row(first_row, lane, i) * gemm::kPitch;
    const uint8_t* const column = weights + gemm::sum_column(first_column, lane, i) * gemm::kPitch;
#pragma unroll
    for (int byte = 0; byte < gemm::kDepth; byte += 4) {
      sums[i] = dot4<kSigned>(word(row, byte), word(column, byte), sums[i]);
    }
  }
#endif
}

// A tile of the product: blockIdx is that of pixels, of channels, and the group.
template <bool kSigned>
__global__ void __launch_bounds__(gemm::kThreads)
    conv_gemm_kernel(gemm::Problem problem, ConvOperands o) {
  __shared__ alignas(gemm::kVector) uint8_t codes[gemm::kTileBytes];
  __shared__ alignas(gemm::kVector) uint8_t weights[gemm::kTileBytes];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / gemm::kWarp, lane = thread % gemm::kWarp;
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x) * gemm::kTileRows;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * gemm::kTileColumns;
  const int64_t group = blockIdx.z;
  const int row = gemm::loaded_row(thread), byte = gemm::loaded_byte(thread);
  const gemm::Pixel pixel = gemm::pixel_at(problem, first_pixel + row);
  const auto zero = static_cast<uint8_t>(*o.x_qparams.zero_point);

  int32_t sums[gemm::kRowProducts][gemm::kColumnProducts][4] = {};
  const int64_t depth = problem.depth();
  for (int64_t k = 0; k < depth; k += gemm::kDepth) {
    const gemm::Vector c = gemm::load_codes(problem, o.x, pixel, group, k + byte, zero);
    const gemm::Vector w =
        gemm::load_weights(problem, o.weight, group, first_channel + row, k + byte);
    __syncthreads();  // until all have read the step before
    *reinterpret_cast<gemm::Vector*>(codes + row * gemm::kPitch + byte) = c;
    *reinterpret_cast<gemm::Vector*>(weights + row * gemm::kPitch + byte) = w;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < gemm::kRowProducts; ++i) {
#pragma unroll
      for (int j = 0; j < gemm::kColumnProducts; ++j) {
        multiply<kSigned>(sums[i][j], codes, weights, gemm::warp_row(warp) + i * gemm::kProductRows,
                          gemm::warp_column(warp) + j * gemm::kProductColumns, lane);
      }
    }
  }

  const gemm::Epilogue epilogue = epilogue_of(o);
  const int64_t pixels = problem.pixels(), channels = problem.groups * problem.out_channels;
#pragma unroll
  for (int i = 0; i < gemm::kRowProducts; ++i) {
#pragma unroll
    for (int j = 0; j < gemm::kColumnProducts; ++j) {
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const int64_t at =
            first_pixel + gemm::sum_row(gemm::warp_row(warp) + i * gemm::kProductRows, lane, s);
        const int64_t in_group =
            first_channel +
            gemm::sum_column(gemm::warp_column(warp) + j * gemm::kProductColumns, lane, s);
        if (at >= pixels || in_group >= problem.out_channels) continue;
        const int64_t channel = group * problem.out_channels + in_group;
        finish(o, epilogue, at * channels + channel, channel,
               wrapping_add(sums[i][j][s], o.offset[channel]));
      }
    }
  }
}

// Groups of few channels, such as depthwise: a thread computes one output.
static __global__ void conv_direct_kernel(gemm::Problem problem, ConvOperands o) {
  const int64_t channels = problem.groups * problem.out_channels;
  const int64_t count = problem.pixels() * channels;
  const gemm::Epilogue epilogue = epilogue_of(o);
  const int32_t zero_point = *o.x_qparams.zero_point;
  for (int64_t i = first_element(); i < count; i += element_step()) {
    const int64_t channel = i % channels;
    const int32_t sum = gemm::direct_sum(
        problem, o.x, o.x_signed, zero_point, o.weight, gemm::pixel_at(problem, i / channels),
        channel / problem.out_channels, channel % problem.out_channels);
    finish(o, epilogue, i, channel, wrapping_add(sum, o.offset[channel]));
  }
}

// Computes all of y, which is not empty. `options` are those of a tensor on the device.
inline void run_int8_conv(const char* op, gemm::Problem problem, ConvOperands o,
                          const at::TensorOptions& options) {
  constexpr int64_t kMostGroups = 65535, kFewChannels = 8;
  const int64_t channels = problem.groups * problem.out_channels;
  const bool direct = problem.groups > 1 && problem.out_channels < kFewChannels;
  const int64_t column_tiles = divide_up(problem.out_channels, gemm::kTileColumns);
  TORCH_CHECK_VALUE(direct || (problem.groups <= kMostGroups && column_tiles <= kMostGroups),
                    "qtoolkit::", op, ": at most ", kMostGroups, " groups of ",
                    kMostGroups * gemm::kTileColumns, " channels can be computed on a GPU");
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor offset = at::empty({channels}, options.dtype(at::kInt));
  const Tensor multiplier = at::empty({channels}, options.dtype(at::kFloat));
  o.offset = mutable_data<int32_t>(offset);
  o.multiplier = mutable_data<float>(multiplier);
  channel_terms<<<static_cast<unsigned>(divide_up(channels, kWarps)), kThreads, 0, stream>>>(
      o, channels, problem.depth(), !direct);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (direct) {
    conv_direct_kernel<<<blocks_for(problem.pixels() * channels), kThreads, 0, stream>>>(problem,
                                                                                         o);
  } else {
    problem.choose_vectors(is_aligned({o.x, o.weight}));
    const dim3 grid(static_cast<unsigned>(divide_up(problem.pixels(), gemm::kTileRows)),
                    static_cast<unsigned>(column_tiles), static_cast<unsigned>(problem.groups));
    const auto kernel = o.x_signed ? conv_gemm_kernel<true> : conv_gemm_kernel<false>;
    kernel<<<grid, gemm::kThreads, 0, stream>>>(problem, o);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace qtoolkit::ops
