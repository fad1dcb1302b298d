// INT8 convolution (and linear, its 1x1 case) on images whose borders are already in memory.
//
//   acc[c]  = offset[c] + sum over taps and input channels of x * w        (int32, exact)
//   y       = clamp(rne(float(acc) * multiplier[c] + r) + zero_point, lo, hi)
//   r       = float(residual - residual_zero_point) * residual_multiplier, or absent
// or, with float output,
//   y       = float(acc) * multiplier[c], then max(y, 0) if relu,
// or, with int32 output (of conv2d alone), y = acc.
//
// x holds unsigned codes, with the zero point in the border, so no tap needs a check; the caller
// folds the zero point and the bias into offset: offset[c] = bias[c] - x_zero_point * sum(w[c]).
#pragma once

#include <cstddef>
#include <cstdint>

namespace qtoolkit::kernels {

// Output channels are computed in blocks of this many; a group's last block is filled with zeros.
inline constexpr int64_t kChannelBlock = 32;
// Bytes that a kernel may read past the last input byte of a pixel run (their weights are zero).
inline constexpr int64_t kOverread = 3;

struct Conv2dShape {
  int64_t images = 1;
  int64_t out_height = 0, out_width = 0;
  int64_t groups = 1;
  int64_t in_channels = 0;   // per group
  int64_t out_channels = 0;  // per group
  int64_t kernel_height = 1, kernel_width = 1;
  int64_t stride_height = 1, stride_width = 1;
  int64_t dilation_height = 1, dilation_width = 1;

  // The taps of one kernel row form runs of contiguous bytes in NHWC: with one group and no
  // dilation one run of kernel_width * in_channels bytes, else kernel_width runs of in_channels.
  bool contiguous_rows() const { return groups == 1 && (dilation_width == 1 || kernel_width == 1); }
  int64_t runs_per_row() const { return contiguous_rows() ? 1 : kernel_width; }
  int64_t run_bytes() const { return (contiguous_rows() ? kernel_width : 1) * in_channels; }
  int64_t run_quads() const { return (run_bytes() + 3) / 4; }
  // A kernel reads run_quads() * 4 bytes of a run, kOverread more than there are at most.
  bool overreads() const { return run_bytes() % 4 != 0; }
  int64_t blocks_per_group() const { return (out_channels + kChannelBlock - 1) / kChannelBlock; }
  // Length of offset and multiplier: every group's channels, filled up to whole blocks.
  int64_t padded_channels() const { return groups * blocks_per_group() * kChannelBlock; }
  int64_t packed_bytes() const {
    return padded_channels() * kernel_height * runs_per_row() * run_quads() * 4;
  }
  int64_t pixels() const { return images * out_height * out_width; }  // of the output
  int64_t weights() const {
    return groups * out_channels * in_channels * kernel_height * kernel_width;
  }
};

// How packed weights lie in memory. Most paths read quads of input bytes,
// [group][block][kernel_height][run][quad][kChannelBlock][4]; steps are in conv2d_steps.h. A block
// of summed_quads begins with the sum of each channel's weights times 128, [kChannelBlock] of int32
// modulo 2^32: what a path adds whose instructions take signed codes, which are 128 less.
enum class Conv2dLayout : uint8_t { quads, steps, summed_quads };
inline constexpr int64_t kBlockSumBytes = kChannelBlock * 4;

enum class Conv2dOutput : uint8_t { codes, float32, int32 };

struct Conv2dArgs {
  Conv2dShape shape;
  const uint8_t* x = nullptr;  // first tap of the first output pixel, channel 0 of group 0
  // Bytes; pixels lie side by side. With one image x_image_stride does not matter.
  int64_t x_image_stride = 0, x_row_stride = 0, x_pixel_stride = 0;
  // Canonical [groups * out_channels, in_channels, kh, kw]: for the reference alone, which unpacks
  // `packed` where it is nullptr.
  const int8_t* weight = nullptr;
  // pack_conv2d_weight's, at a multiple of 64 bytes; conv2d_packed_block's may be elsewhere.
  // A path may ask the cache for what follows: best the weights of the next call.
  const int8_t* packed = nullptr;
  // Of packed. A path that does not read it, since another one was forced after packing, leaves the
  // call to the portable one.
  Conv2dLayout layout = Conv2dLayout::quads;
  const int32_t* offset = nullptr;    // [padded_channels()]
  const float* multiplier = nullptr;  // [padded_channels()]

  Conv2dOutput output = Conv2dOutput::codes;
  // NHWC, groups * out_channels side by side in a pixel, uint8/int8 codes, float32 or int32.
  // Strides in elements; without gaps a row is out_width * y_pixel_stride and an image out_height
  // rows.
  void* y = nullptr;
  int64_t y_image_stride = 0, y_row_stride = 0, y_pixel_stride = 0;
  int32_t zero_point = 0, lo = 0, hi = 255;  // codes
  bool relu = false;                         // float32 only; with codes ReLU is in lo

  const void* residual = nullptr;  // like y, codes; nullptr if absent
  int64_t residual_image_stride = 0, residual_row_stride = 0, residual_pixel_stride = 0;
  bool residual_signed = false;
  int32_t residual_zero_point = 0;
  float residual_multiplier = 0.0f;
};

// Output pixels that one unit of work covers: one unit is one block of kChannelBlock channels at
// kTilePixels consecutive pixels (in row-major order of the output, image after image; the last
// unit is shorter).
inline constexpr int64_t kTilePixels = 7;

inline int64_t conv2d_tiles(const Conv2dShape& shape) {
  return (shape.pixels() + kTilePixels - 1) / kTilePixels;
}
// Units are numbered block by block: unit = block * conv2d_tiles + tile, so that a contiguous range
// keeps one block's weights in cache.
inline int64_t conv2d_units(const Conv2dShape& shape) {
  return shape.groups * shape.blocks_per_group() * conv2d_tiles(shape);
}

// Accumulators wrap, as in the vector instructions: the sum fits, what it passes on the way may
// not.
static inline int32_t wrapping_add(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end);

// What the path of the next call reads fastest; the size of the output does not matter.
Conv2dLayout conv2d_layout(const Conv2dShape& shape);
int64_t conv2d_packed_bytes(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* weight);
void pack_conv2d_weight(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* weight,
                        int8_t* packed);
void unpack_conv2d_weight(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* packed,
                          int8_t* weight);
// What a call for the blocks from this one on reads.
const int8_t* conv2d_packed_block(Conv2dLayout layout, const Conv2dShape& shape,
                                  const int8_t* packed, int64_t block);

// Depthwise: groups == channels, one input and one output channel each (in_channels and
// out_channels of the shape are 1). packed is [kernel_height * kernel_width][channels]; offset and
// multiplier have `groups` entries. Units of work are output rows, flat over images * out_height.
void conv2d_depthwise(const Conv2dArgs& args, int64_t begin, int64_t end);
void pack_conv2d_depthwise_weight(const Conv2dShape& shape, const int8_t* weight, int8_t* packed);
void unpack_conv2d_depthwise_weight(const Conv2dShape& shape, const int8_t* packed, int8_t* weight);

}  // namespace qtoolkit::kernels
