#include "kernels/quantize_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/rounding.h"
#include "core/value_range.h"

namespace qtoolkit::kernels::reference {

void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.x_row_stride;
    uint8_t* codes = args.codes + row * args.codes_row_stride;
    ValueRange range{0.0f, 0.0f};
    bool finite = true;
    for (int64_t i = 0; i < args.width; ++i) {
      finite = finite && std::isfinite(x[i]);
      range = {std::min(range.min, x[i]), std::max(range.max, x[i])};
    }
    if (!finite) {
      args.scale[row] = std::numeric_limits<float>::quiet_NaN();
      args.zero_point[row] = 0;
      std::fill_n(codes, args.width, uint8_t{0});
      continue;
    }
    const auto [scale, zero_point] = range_to_qparams(range, /*symmetric=*/false, 0, 255);
    args.scale[row] = scale;
    args.zero_point[row] = zero_point;
    for (int64_t i = 0; i < args.width; ++i) {
      codes[i] = static_cast<uint8_t>(quantize_value(x[i], 1.0f / scale, zero_point, 0, 255));
    }
  }
}

}  // namespace qtoolkit::kernels::reference
