// What the CUDA operators on 8-bit codes share: parameters on the device, loops over elements.
#pragma once

#include "core/rounding.h"
#include "ops/checks.h"
#include "ops/cuda/common.cuh"

namespace qtoolkit::ops {

// Quantization parameters on the device; without a pointer there are none.
struct DeviceQParams {
  const float* scale = nullptr;
  const int32_t* zero_point = nullptr;

  DeviceQParams() = default;
  DeviceQParams(const Tensor& scale, const Tensor& zero_point)
      : scale(const_data<float>(scale)), zero_point(const_data<int32_t>(zero_point)) {}
};

// Codes that are read.
struct CodesIn {
  const uint8_t* data = nullptr;
  bool is_signed = false;
  DeviceQParams qparams;

  explicit CodesIn(const Tensor& codes)
      : data(const_data<uint8_t>(codes)), is_signed(codes.scalar_type() == at::kChar) {}
  CodesIn(const Tensor& codes, const Tensor& scale, const Tensor& zero_point)
      : data(const_data<uint8_t>(codes)),
        is_signed(codes.scalar_type() == at::kChar),
        qparams(scale, zero_point) {}

  __device__ int32_t code(int64_t i) const {
    return is_signed ? static_cast<int32_t>(static_cast<int8_t>(data[i])) : data[i];
  }
};

// The lower bound of codes: real 0 with ReLU.
__device__ inline int32_t relu_bound(int32_t least, int32_t zero_point, bool relu) {
  return relu && zero_point > least ? zero_point : least;
}

// Codes that are written; int8 and uint8 have the same low byte.
struct CodesOut {
  uint8_t* data = nullptr;
  DeviceQParams qparams;
  CodeRange range;
  bool relu = false;

  __device__ void store(int64_t i, float steps) const {
    const int32_t zero_point = *qparams.zero_point;
    const int32_t low = relu_bound(range.min, zero_point, relu);
    data[i] = static_cast<uint8_t>(qtoolkit::round_to_code(steps, zero_point, low, range.max));
  }
};

// float(double(a) / b), as multiplier() computes it.
__device__ inline float quotient(float a, float b) {
  return static_cast<float>(static_cast<double>(a) / static_cast<double>(b));
}

// The elements of a thread: the threads of the grid take turns.
__device__ inline int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t element_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

inline unsigned blocks_for(int64_t count) {
  constexpr int64_t kMostBlocks = 65536;  // the threads of more go round again
  return static_cast<unsigned>(std::min(divide_up(count, kThreads), kMostBlocks));
}

// Calls element(i) for each of `count`.
template <class Element>
__global__ void each_kernel(int64_t count, Element element) {
  for (int64_t i = first_element(); i < count; i += element_step()) element(i);
}
template <class Element>
void for_each(int64_t count, const Element& element) {
  if (count == 0) return;
  each_kernel<<<blocks_for(count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(count,
                                                                                     element);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Offsets of the elements of some dimensions in several tensors.
template <int kTensors>
struct Strides {
  static constexpr int kMostDims = 12;
  int rank = 0;
  int64_t sizes[kMostDims] = {};
  int64_t strides[kTensors][kMostDims] = {};

  void add(int64_t size, const int64_t (&steps)[kTensors]) {
    TORCH_CHECK_VALUE(rank < kMostDims, "qtoolkit: at most ", kMostDims,
                      " dimensions can be computed on a GPU");
    sizes[rank] = size;
    for (int t = 0; t < kTensors; ++t) strides[t][rank] = steps[t];
    ++rank;
  }
  int64_t count() const {
    int64_t result = 1;
    for (int d = 0; d < rank; ++d) result *= sizes[d];
    return result;
  }
  // Of element i, counted with the last dimension first.
  __device__ void offsets(int64_t i, int64_t (&result)[kTensors]) const {
    for (int t = 0; t < kTensors; ++t) result[t] = 0;
    for (int d = rank - 1; d >= 0; --d) {
      const int64_t at = i % sizes[d];
      i /= sizes[d];
      for (int t = 0; t < kTensors; ++t) result[t] += at * strides[t][d];
    }
  }
};

}  // namespace qtoolkit::ops
