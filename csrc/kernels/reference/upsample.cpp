#include "kernels/upsample.h"

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {

void upsample_bilinear2d(const UpsampleBilinear2dArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const LinearSource& r = args.rows[i];
    for (int64_t j = 0; j < args.out_width; ++j) {
      const LinearSource& c = args.columns[j];
      for (int64_t channel = 0; channel < args.channels; ++channel) {
        const auto value_at = [&](int64_t h, int64_t w) {
          const uint8_t code =
              args.x[n * args.x_image_stride + h * args.x_row_stride + w * args.channels + channel];
          const int32_t value = args.x_signed ? static_cast<int8_t>(code) : code;
          return static_cast<float>(value - args.x_zero_point);
        };
        const float left = value_at(r.first, c.first) * r.first_weight +
                           value_at(r.second, c.first) * r.second_weight;
        const float right = value_at(r.first, c.second) * r.first_weight +
                            value_at(r.second, c.second) * r.second_weight;
        const float value = left * c.first_weight + right * c.second_weight;
        args.y[n * args.y_image_stride + i * args.y_row_stride + j * args.channels + channel] =
            static_cast<uint8_t>(round_to_code(value, args.zero_point, args.lo, args.hi));
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
