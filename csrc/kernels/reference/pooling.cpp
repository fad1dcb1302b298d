#include "kernels/pooling.h"

#include <cstdint>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

int32_t value_of(uint8_t code, bool is_signed) {
  return is_signed ? static_cast<int8_t>(code) : code;
}

}  // namespace

void max_pool2d(const MaxPool2dArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const uint8_t* x = args.x + n * args.x_image_stride;
    uint8_t* y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    for (int64_t j = 0; j < args.out_width; ++j) {
      for (int64_t c = 0; c < args.channels; ++c) {
        int32_t largest = INT32_MIN;
        for (int64_t h = args.row_begin[i]; h < args.row_end[i]; h += args.row_step) {
          for (int64_t w = args.column_begin[j]; w < args.column_end[j]; w += args.column_step) {
            const uint8_t code = x[h * args.x_row_stride + w * args.channels + c];
            const int32_t value = value_of(code, args.is_signed);
            if (value > largest) largest = value;
          }
        }
        y[j * args.channels + c] = static_cast<uint8_t>(largest);
      }
    }
  }
}

void avg_pool2d(const AvgPool2dArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const uint8_t* x = args.x + n * args.x_image_stride;
    uint8_t* y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    for (int64_t j = 0; j < args.out_width; ++j) {
      const int64_t divisor = args.row_divisor[i] * args.column_divisor[j];
      const float multiplier = static_cast<float>(args.multiplier / static_cast<double>(divisor));
      for (int64_t c = 0; c < args.channels; ++c) {
        int32_t sum = 0;
        for (int64_t h = args.row_begin[i]; h < args.row_end[i]; ++h) {
          for (int64_t w = args.column_begin[j]; w < args.column_end[j]; ++w) {
            const uint8_t code = x[h * args.x_row_stride + w * args.channels + c];
            sum += value_of(code, args.x_signed) - args.x_zero_point;
          }
        }
        y[j * args.channels + c] = static_cast<uint8_t>(
            round_to_code(static_cast<float>(sum) * multiplier, args.zero_point, args.lo, args.hi));
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
