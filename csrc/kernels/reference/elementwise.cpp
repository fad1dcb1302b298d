#include "kernels/elementwise.h"

#include <cstdint>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

int32_t centred(uint8_t code, bool is_signed, int32_t zero_point) {
  return (is_signed ? static_cast<int8_t>(code) : code) - zero_point;
}

// Calls element(a, b) for the centred codes of every element and stores the code of what it gives.
template <class Args, class Element>
void for_each(const Args& args, int64_t begin, int64_t end, Element element) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* a = args.a + row * args.a_row_stride;
    const uint8_t* b = args.b + row * args.b_row_stride;
    uint8_t* y = args.y + row * args.y_row_stride;
    for (int64_t c = 0; c < args.channels; ++c) {
      const float value =
          element(centred(a[c], args.a_signed, args.a_zero_point),
                  centred(b[args.b_single ? 0 : c], args.b_signed, args.b_zero_point));
      y[c] = static_cast<uint8_t>(round_to_code(value, args.zero_point, args.lo, args.hi));
    }
  }
}

}  // namespace

void add(const AddArgs& args, int64_t begin, int64_t end) {
  for_each(args, begin, end, [&](int32_t a, int32_t b) {
    return static_cast<float>(a) * args.a_multiplier + static_cast<float>(b) * args.b_multiplier;
  });
}

void mul(const MulArgs& args, int64_t begin, int64_t end) {
  for_each(args, begin, end,
           [&](int32_t a, int32_t b) { return static_cast<float>(a * b) * args.multiplier; });
}

void requantize(const RequantizeArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = args.x + row * args.x_row_stride;
    uint8_t* y = args.y + row * args.y_row_stride;
    for (int64_t c = 0; c < args.channels; ++c) {
      const int64_t k = args.channels_apart ? c : 0;
      const int32_t code = centred(x[c], args.x_signed, args.x_zero_point);
      float value = static_cast<float>(code) * args.multiplier[k];
      if (args.addend != nullptr) value += args.addend[k];
      y[c] = static_cast<uint8_t>(round_to_code(value, args.zero_point, args.lo, args.hi));
    }
  }
}

}  // namespace qtoolkit::kernels::reference
