#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/weight_only.h"

namespace qtoolkit::kernels::reference {
namespace {

float number_of(const FloatWeight& weight, int64_t n, int64_t k) {
  const int64_t bit = k * weight.bits;
  const uint8_t* const from = weight.codes + n * weight.row_stride + bit / 8;
  int code = from[0] >> (bit % 8);
  if (bit % 8 + weight.bits > 8) code |= from[1] << (8 - bit % 8);
  code &= (1 << weight.bits) - 1;
  const int64_t at = n * weight.groups() + k / weight.group;
  if (weight.numbers) return weight.numbers[code] * weight.scale[at];
  const float zero = weight.zero_point ? static_cast<float>(weight.zero_point[at]) : weight.zero;
  return (static_cast<float>(code) - zero) * weight.scale[at];
}

}  // namespace

void multiply_floats(const MultiplyFloatsArgs& args, int64_t begin, int64_t end) {
  const FloatWeight& weight = args.weight;
  const int64_t last = std::min(end * kFloatChannels, weight.channels);
  for (int64_t n = begin * kFloatChannels; n < last; ++n) {
    for (int64_t m = 0; m < args.rows; ++m) {
      const float* const x = args.x + m * weight.blocks() * kFloatBlock;
      std::array<float, kFloatLanes> sums{};
      for (int64_t k = 0; k < weight.blocks() * kFloatBlock; ++k) {
        float& sum = sums[static_cast<size_t>(k / kFloatRun % kFloatLanes)];
        const float number = k < weight.width ? number_of(weight, n, k) : 0.0f;
        sum = std::fma(number, x[float_position(k)], sum);
      }
      for (size_t half = kFloatLanes / 2; half > 0; half /= 2) {
        for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
      }
      args.y[m * args.y_row_stride + n] = args.bias ? sums[0] + args.bias[n] : sums[0];
    }
  }
}

}  // namespace qtoolkit::kernels::reference
