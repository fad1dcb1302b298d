#include "kernels/scale_sums.h"

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return activate<Activation::relu, float, int32_t>(x);
    case Activation::gelu:
      return activate<Activation::gelu, float, int32_t>(x);
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh, float, int32_t>(x);
    case Activation::silu:
      return activate<Activation::silu, float, int32_t>(x);
    case Activation::none:
      break;
  }
  return x;
}

// Wraps where int32 would overflow.
int32_t sum_of(const ScaleSumsArgs& args, int64_t row, int64_t column) {
  auto acc = static_cast<uint32_t>(args.sums[row * args.sums_row_stride + column]);
  acc +=
      static_cast<uint32_t>(args.row_factor[row]) * static_cast<uint32_t>(args.column_term[column]);
  if (args.row_term != nullptr) acc += static_cast<uint32_t>(args.row_term[row]);
  return static_cast<int32_t>(acc);
}

}  // namespace

void scale_sums(const ScaleSumsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < args.columns; ++column) {
      float value = static_cast<float>(sum_of(args, row, column)) *
                    (args.row_scale[row] * args.column_scale[column]);
      if (args.bias != nullptr) value += args.bias[column];
      value = activated(args.activation, value);
      const int64_t to = row * args.y_row_stride + column;
      if (args.y_codes == nullptr) {
        args.y[to] = value;
      } else {
        args.y_codes[to] =
            static_cast<uint8_t>(round_to_code(value, args.zero_point, args.lo, args.hi));
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
