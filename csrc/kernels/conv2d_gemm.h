// A convolution of codes as a product of matrices in tiles, as GPUs compute it: the index
// arithmetic, which the host runs too, for tests. Rows of the product are output pixels, columns
// output channels of a group, and the depth goes over taps, then input channels.
//
// x is NHWC and the weight [groups * out_channels, kernel_height, kernel_width, in_channels], both
// without gaps. What lies outside of the image has the code of zero, so that with the exact sum
//   acc = offset[c] + sum(x * w), offset[c] = bias[c] - x_zero_point * sum(w[c])
// modulo 2^32 is that of the CPU's kernels.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/rounding.h"

namespace qtoolkit::kernels::gemm {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 128;  // of a block, which computes a tile of the product
inline constexpr int kTileRows = 64, kTileColumns = 64;
inline constexpr int kDepth = 32;   // bytes of a row that a step multiplies
inline constexpr int kVector = 16;  // bytes that a thread loads at once
inline constexpr int kPitch = 48;   // between rows in shared memory: no two lanes meet in a bank
inline constexpr int kTileBytes = kTileRows * kPitch;

// A warp computes 32 x 32 of the tile in products of 16 x 8 (m16n8k32).
inline constexpr int kWarpSide = 32;
inline constexpr int kProductRows = 16, kProductColumns = 8;
inline constexpr int kRowProducts = kWarpSide / kProductRows;
inline constexpr int kColumnProducts = kWarpSide / kProductColumns;

struct Problem {
  int64_t images = 1;
  int64_t height = 1, width = 1;  // of the input
  int64_t out_height = 1, out_width = 1;
  int64_t groups = 1;
  int64_t in_channels = 1, out_channels = 1;  // per group
  int64_t kernel_height = 1, kernel_width = 1;
  int64_t stride_height = 1, stride_width = 1;
  int64_t padding_height = 0, padding_width = 0;
  int64_t dilation_height = 1, dilation_width = 1;
  // Whether x and weight may be read kVector bytes at a time.
  bool x_vectors = false, weight_vectors = false;

  QT_HOST_DEVICE int64_t pixels() const { return images * out_height * out_width; }
  QT_HOST_DEVICE int64_t depth() const { return kernel_height * kernel_width * in_channels; }
  QT_HOST_DEVICE int64_t channels() const { return groups * in_channels; }

  // Given aligned memory: a vector then lies in one tap.
  void choose_vectors(bool aligned) {
    x_vectors = aligned && in_channels % kVector == 0;
    weight_vectors = aligned && depth() % kVector == 0;
  }
};

struct alignas(kVector) Vector {
  uint8_t bytes[kVector];
};

// The place of an output pixel's first tap in the input; it may lie outside.
struct Pixel {
  int64_t image = 0, row = 0, column = 0;
  bool exists = false;
};

QT_HOST_DEVICE inline Pixel pixel_at(const Problem& p, int64_t index) {
  if (index >= p.pixels()) return {};
  const int64_t row = index / p.out_width;
  return {row / p.out_height, row % p.out_height * p.stride_height - p.padding_height,
          index % p.out_width * p.stride_width - p.padding_width, true};
}

// The byte of x that tap (ky, kx) of a pixel reads, for channel 0 of the group; -1 outside.
QT_HOST_DEVICE inline int64_t tap_at(const Problem& p, const Pixel& pixel, int64_t group,
                                     int64_t ky, int64_t kx) {
  const int64_t row = pixel.row + ky * p.dilation_height;
  const int64_t column = pixel.column + kx * p.dilation_width;
  if (row < 0 || row >= p.height || column < 0 || column >= p.width) return -1;
  return ((pixel.image * p.height + row) * p.width + column) * p.channels() + group * p.in_channels;
}

// Codes [k, k + kVector) of a pixel's row; 0 beyond the depth, where weights are 0.
QT_HOST_DEVICE inline Vector load_codes(const Problem& p, const uint8_t* x, const Pixel& pixel,
                                        int64_t group, int64_t k, uint8_t zero) {
  Vector result = {};
  if (!pixel.exists || k >= p.depth()) return result;
  int64_t channel = k % p.in_channels;
  int64_t kx = k / p.in_channels % p.kernel_width;
  int64_t ky = k / p.in_channels / p.kernel_width;
  int64_t from = tap_at(p, pixel, group, ky, kx);
  if (p.x_vectors && from >= 0) return *reinterpret_cast<const Vector*>(x + from + channel);
  for (int i = 0; i < kVector && k + i < p.depth(); ++i) {
    result.bytes[i] = from >= 0 ? x[from + channel] : zero;
    if (++channel < p.in_channels) continue;
    channel = 0;
    if (++kx == p.kernel_width) {
      kx = 0;
      ++ky;
    }
    from = tap_at(p, pixel, group, ky, kx);
  }
  return result;
}

// Weights [k, k + kVector) of an output channel of a group; 0 where there are none.
QT_HOST_DEVICE inline Vector load_weights(const Problem& p, const int8_t* weight, int64_t group,
                                          int64_t channel, int64_t k) {
  Vector result = {};
  if (channel >= p.out_channels || k >= p.depth()) return result;
  const int8_t* const from = weight + (group * p.out_channels + channel) * p.depth() + k;
  if (p.weight_vectors) return *reinterpret_cast<const Vector*>(from);
  for (int i = 0; i < kVector && k + i < p.depth(); ++i) {
    result.bytes[i] = static_cast<uint8_t>(from[i]);
  }
  return result;
}

// What a thread loads of a step: a vector of a row of the codes, and one of the weights' tile.
QT_HOST_DEVICE inline int loaded_row(int thread) { return thread / (kDepth / kVector); }
QT_HOST_DEVICE inline int loaded_byte(int thread) { return thread % (kDepth / kVector) * kVector; }
static_assert(kThreads * kVector == kTileRows * kDepth && kTileRows == kTileColumns);

// Where a warp's part of the tile begins.
QT_HOST_DEVICE inline int warp_row(int warp) { return warp % 2 * kWarpSide; }
QT_HOST_DEVICE inline int warp_column(int warp) { return warp / 2 * kWarpSide; }

// Registers of one product (PTX ISA, matrix fragments for mma.m16n8k32): which bytes of the tiles a
// lane's word of codes or weights holds, and which element of the product is in a sum.
QT_HOST_DEVICE inline int codes_word(int first_row, int lane, int word) {
  return (first_row + lane / 4 + word % 2 * 8) * kPitch + lane % 4 * 4 + word / 2 * 16;
}
QT_HOST_DEVICE inline int weights_word(int first_column, int lane, int word) {
  return (first_column + lane / 4) * kPitch + lane % 4 * 4 + word * 16;
}
QT_HOST_DEVICE inline int sum_row(int first_row, int lane, int sum) {
  return first_row + lane / 4 + sum / 2 * 8;
}
QT_HOST_DEVICE inline int sum_column(int first_column, int lane, int sum) {
  return first_column + lane % 4 * 2 + sum % 2;
}

// The sum of products of one pixel and channel, in units where x has its zero point taken off.
QT_HOST_DEVICE inline int32_t direct_sum(const Problem& p, const uint8_t* x, bool x_signed,
                                         int32_t x_zero_point, const int8_t* weight,
                                         const Pixel& pixel, int64_t group, int64_t channel) {
  const int8_t* w = weight + (group * p.out_channels + channel) * p.depth();
  uint32_t sum = 0;
  for (int64_t ky = 0; ky < p.kernel_height; ++ky) {
    for (int64_t kx = 0; kx < p.kernel_width; ++kx, w += p.in_channels) {
      const int64_t from = tap_at(p, pixel, group, ky, kx);
      if (from < 0) continue;
      for (int64_t i = 0; i < p.in_channels; ++i) {
        const uint8_t byte = x[from + i];
        const int32_t code = x_signed ? static_cast<int8_t>(byte) : byte;
        sum += static_cast<uint32_t>((code - x_zero_point) * w[i]);
      }
    }
  }
  return static_cast<int32_t>(sum);
}

// How a finished sum becomes an output.
struct Epilogue {
  bool float_output = false, relu = false;  // ReLU of codes is in lo
  int32_t zero_point = 0, lo = 0, hi = 255;
  bool residual_signed = false;
  int32_t residual_zero_point = 0;
  float residual_multiplier = 0.0f;

  QT_HOST_DEVICE float real(int32_t acc, float multiplier) const {
    const float value = static_cast<float>(acc) * multiplier;
    return relu && value < 0.0f ? 0.0f : value;
  }
  // `residual` is a byte of codes, or none.
  QT_HOST_DEVICE uint8_t code(int32_t acc, float multiplier, const uint8_t* residual) const {
    float value = static_cast<float>(acc) * multiplier;
    if (residual != nullptr) {
      const int32_t code = residual_signed ? static_cast<int8_t>(*residual) : *residual;
      value += static_cast<float>(code - residual_zero_point) * residual_multiplier;
    }
    // int8 and uint8 codes have the same low byte.
    return static_cast<uint8_t>(round_to_code(value, zero_point, lo, hi));
  }
};

}  // namespace qtoolkit::kernels::gemm
