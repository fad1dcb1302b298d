// One to four planes to pixels without gaps: 16 codes of each plane, which st2, st3 and st4
// interleave. Other layouts take the plain loops.
#include "kernels/cpu/codes_neon.h"
#include "kernels/cpu/rounding.h"
#include "kernels/quantize_image.h"

namespace qtoolkit::kernels::neondot {
namespace plain {
#include "kernels/cpu/quantize_image.inl"
}  // namespace plain

namespace {

template <int kChannels>
inline void store_pixels(uint8_t* y, const uint8x16_t (&codes)[kChannels]) {
  if constexpr (kChannels == 2) {
    const uint8x16x2_t pixels = {{codes[0], codes[1]}};
    vst2q_u8(y, pixels);
  } else if constexpr (kChannels == 3) {
    const uint8x16x3_t pixels = {{codes[0], codes[1], codes[2]}};
    vst3q_u8(y, pixels);
  } else {
    const uint8x16x4_t pixels = {{codes[0], codes[1], codes[2], codes[3]}};
    vst4q_u8(y, pixels);
  }
}

// `count` pixels of one row.
template <int kChannels>
void quantize_planes(const QuantizeImageArgs& args, const float* x, int64_t count,
                     const CodesOut& shared, uint8_t* y) {
  const CodesOut out = shared;  // which a store of bytes cannot change
  const float inverse = 1.0f / args.scale;
  const int64_t stride = args.x_channel_stride;
  const auto pixels = [&](const float* from, int64_t plane_stride, uint8_t* to) {
    uint8x16_t codes[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      float32x4_t parts[4];
      for (int k = 0; k < 4; ++k) {
        parts[k] = vmulq_n_f32(vld1q_f32(from + c * plane_stride + 4 * k), inverse);
      }
      codes[c] = out(parts);
    }
    store_pixels<kChannels>(to, codes);
  };
  int64_t j = 0;
  for (; j + kCodes <= count; j += kCodes) pixels(x + j, stride, y + j * kChannels);
  if (const int64_t left = count - j; left > 0) {
    float values[kChannels][kCodes] = {};
    uint8_t last[kChannels * kCodes];
    for (int c = 0; c < kChannels; ++c) {
      __builtin_memcpy(values[c], x + c * stride + j, static_cast<size_t>(left) * sizeof(float));
    }
    pixels(values[0], kCodes, last);
    __builtin_memcpy(y + j * kChannels, last, static_cast<size_t>(left * kChannels));
  }
}

}  // namespace

void quantize_image(const QuantizeImageArgs& args, int64_t begin, int64_t end) {
  const bool dense = args.y_pixel_stride == args.channels;
  const bool pixels = args.x_channel_stride == 1 && args.x_column_stride == args.channels;
  const bool planes = args.x_column_stride == 1 && args.channels <= 4;
  if (!dense || !(pixels || planes)) return plain::quantize_image(args, begin, end);
  // A row whose channels lie side by side on both sides is one plane.
  const int64_t channels = pixels ? 1 : args.channels;
  const int64_t count = pixels ? args.width * args.channels : args.width;
  const CodesOut out(args.zero_point, args.quant_min, args.quant_max);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, i = row % args.height;
    const float* const x = args.x + n * args.x_image_stride + i * args.x_row_stride;
    uint8_t* const y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    if (channels == 1) quantize_codes(x, count, 1.0f / args.scale, out, y);
    if (channels == 2) quantize_planes<2>(args, x, count, out, y);
    if (channels == 3) quantize_planes<3>(args, x, count, out, y);
    if (channels == 4) quantize_planes<4>(args, x, count, out, y);
  }
}

void dequantize_image(const DequantizeImageArgs& args, int64_t begin, int64_t end) {
  const bool dense = args.y_channel_stride == 1 && args.y_column_stride == args.channels &&
                     args.x_pixel_stride == args.channels;
  if (!dense) return plain::dequantize_image(args, begin, end);
  const CodesIn in(args.is_signed, args.zero_point);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, i = row % args.height;
    dequantize_codes(args.x + n * args.x_image_stride + i * args.x_row_stride,
                     args.width * args.channels, args.scale, in,
                     args.y + n * args.y_image_stride + i * args.y_row_stride);
  }
}

}  // namespace qtoolkit::kernels::neondot
