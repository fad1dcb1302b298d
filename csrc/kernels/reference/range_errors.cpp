#include "kernels/range_errors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

// The sum of term(i) for i < count, in the order that range_errors.h gives.
template <class Term>
double sum_of(int64_t count, Term term) {
  std::array<double, 8> lanes{};
  for (int64_t i = 0; i < count; ++i) lanes[i % 8] += term(i);
  for (int64_t half = 4; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

}  // namespace

void cell_errors(const CellErrorsArgs& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const double first = args.first[c], last = args.last[c];
    const double cell = (last - first + 1) / args.levels;
    const double half = cell / 2;
    const auto integral = [&](double edge) {
      const double k = std::trunc(std::clamp(edge / cell, 0.0, args.levels - 1.0));
      const double distance = edge - (k + 0.5) * cell;
      return k * (2 * (half * half * half)) + distance * distance * distance;
    };
    args.errors[c] =
        sum_of(args.bins,
               [&](int64_t i) {
                 const auto edge = static_cast<double>(i);
                 return args.mass[i] * (integral(edge + 1 - first) - integral(edge - first));
               }) /
        3;
  }
}

void scale_errors(const ScaleErrorsArgs& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const float scale = args.scale[c];
    args.errors[c] = sum_of(args.size, [&](int64_t i) {
      const int32_t q = quantize_value(args.x[i], 1.0f / scale, args.zero_point[c], args.quant_min,
                                       args.quant_max);
      const double error = args.x[i] - dequantize_value(q, scale, args.zero_point[c]);
      return (args.mass == nullptr ? 1.0 : args.mass[i]) * (error * error);
    });
  }
}

}  // namespace qtoolkit::kernels::reference
