#include "kernels/softmax.h"

#include <algorithm>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

int32_t value_of(uint8_t code, bool is_signed) {
  return is_signed ? static_cast<int8_t>(code) : code;
}

}  // namespace

void softmax(const SoftmaxArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = args.x + row * args.x_row_stride;
    int32_t largest = value_of(x[0], args.is_signed);
    for (int64_t i = 1; i < args.length; ++i) {
      largest = std::max(largest, value_of(x[i], args.is_signed));
    }
    float part[16] = {};
    for (int64_t i = 0; i < args.length; ++i) {
      part[i % 16] += args.table.at(largest - value_of(x[i], args.is_signed));
    }
    for (int half = 8; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) part[k] += part[k + half];
    }
    const float sum = part[0];
    const float factor = 1.0f / (args.y_float != nullptr ? sum : sum * args.y_scale);
    for (int64_t i = 0; i < args.length; ++i) {
      const float value = args.table.at(largest - value_of(x[i], args.is_signed)) * factor;
      const int64_t at = row * args.y_row_stride + i;
      if (args.y_float != nullptr) {
        args.y_float[at] = value;
      } else {
        args.y[at] = static_cast<uint8_t>(round_to_code(value, args.zero_point, args.lo, args.hi));
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
