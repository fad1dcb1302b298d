#include "kernels/elementwise.h"

#include <cstdint>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

float centred(uint8_t code, bool is_signed, int32_t zero_point) {
  const int32_t value = is_signed ? static_cast<int8_t>(code) : code;
  return static_cast<float>(value - zero_point);
}

}  // namespace

void add(const AddArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float a = centred(args.a[i], args.a_signed, args.a_zero_point) * args.a_multiplier;
    const float b = centred(args.b[i], args.b_signed, args.b_zero_point) * args.b_multiplier;
    args.y[i] = static_cast<uint8_t>(round_to_code(a + b, args.zero_point, args.lo, args.hi));
  }
}

void requantize(const RequantizeArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = args.x + row * args.x_row_stride;
    uint8_t* y = args.y + row * args.y_row_stride;
    for (int64_t c = 0; c < args.channels; ++c) {
      const int64_t k = args.channels_apart ? c : 0;
      float value = centred(x[c], args.x_signed, args.x_zero_point) * args.multiplier[k];
      if (args.addend != nullptr) value += args.addend[k];
      y[c] = static_cast<uint8_t>(round_to_code(value, args.zero_point, args.lo, args.hi));
    }
  }
}

}  // namespace qtoolkit::kernels::reference
