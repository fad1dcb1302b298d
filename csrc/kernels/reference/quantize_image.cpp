#include "kernels/quantize_image.h"

#include <cstdint>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {

void quantize_image(const QuantizeImageArgs& args, int64_t begin, int64_t end) {
  const float inverse = 1.0f / args.scale;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, i = row % args.height;
    for (int64_t j = 0; j < args.width; ++j) {
      for (int64_t c = 0; c < args.channels; ++c) {
        const float value = args.x[n * args.x_image_stride + c * args.x_channel_stride +
                                   i * args.x_row_stride + j * args.x_column_stride];
        args.y[n * args.y_image_stride + i * args.y_row_stride + j * args.y_pixel_stride + c] =
            static_cast<uint8_t>(
                quantize_value(value, inverse, args.zero_point, args.quant_min, args.quant_max));
      }
    }
  }
}

void dequantize_image(const DequantizeImageArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, i = row % args.height;
    for (int64_t j = 0; j < args.width; ++j) {
      for (int64_t c = 0; c < args.channels; ++c) {
        const uint8_t byte =
            args.x[n * args.x_image_stride + i * args.x_row_stride + j * args.x_pixel_stride + c];
        const int32_t code = args.is_signed ? int32_t{static_cast<int8_t>(byte)} : int32_t{byte};
        args.y[n * args.y_image_stride + c * args.y_channel_stride + i * args.y_row_stride +
               j * args.y_column_stride] = dequantize_value(code, args.scale, args.zero_point);
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
