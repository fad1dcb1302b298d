#include "kernels/layer_norm.h"

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {

void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = args.x + row * args.x_row_stride;
    const auto code = [&](int64_t i) {
      return args.is_signed ? static_cast<int8_t>(x[i]) : int32_t{x[i]};
    };
    int64_t sum = 0, squares = 0;
    for (int64_t i = 0; i < args.length; ++i) {
      const int64_t centred = code(i) - args.x_zero_point;
      sum += centred;
      squares += centred * centred;
    }
    const LayerNormRow r = layer_norm_row(args, sum, squares);
    for (int64_t i = 0; i < args.length; ++i) {
      const float value =
          (static_cast<float>(code(i) - r.middle) * r.a + r.b) * args.weight[i] + args.bias[i];
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
