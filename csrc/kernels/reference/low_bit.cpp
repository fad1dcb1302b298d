#include "kernels/low_bit.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace qtoolkit::kernels::reference {
namespace {

// y = value(x, channel) where x is no NaN, and the mask's bits passes(x, channel).
template <class Value, class Passes>
void for_each_element(const LowBitArgs& args, int64_t begin, int64_t end, Value value,
                      Passes passes) {
  if (args.mask != nullptr) std::memset(args.mask + begin / 8, 0, (end - begin + 7) / 8);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = args.channels == 1 ? 0 : i / args.inner % args.channels;
    const float x = args.x[i - args.first];
    args.y[i - args.first] = std::isnan(x) ? x : value(x, c);
    if (args.mask != nullptr && !std::isnan(x) && passes(x, c)) {
      args.mask[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
    }
  }
}

// The format's number nearest to v, in double, where every step is exact.
float nearest(const FloatFormat& format, float v) {
  const double size = std::min<double>(std::abs(v), format.max_value);
  if (size == 0.0) return v;
  const int exponent = std::max(std::ilogb(size), format.min_exponent);
  const double step = std::ldexp(1.0, exponent - format.mantissa_bits);
  return std::copysign(static_cast<float>(std::nearbyint(size / step) * step), v);
}

// x * inverse, where 0 times infinity is 0 with the sign of x.
float product(float x, float inverse) {
  const float v = x * inverse;
  return std::isnan(v) ? std::copysign(0.0f, x) : v;
}

float block_scale(const BlockFloatArgs& args, float amax) {
  constexpr FloatFormat kE4m3{.mantissa_bits = 3, .min_exponent = -6, .max_value = 448.0f};
  if (args.tensor_scale != 0.0f) {
    return nearest(kE4m3, amax / args.format.max_value / args.tensor_scale) * args.tensor_scale;
  }
  const int exponent = amax == 0.0f ? -127 : std::ilogb(amax) - std::ilogb(args.format.max_value);
  return std::ldexp(1.0f, std::clamp(exponent, -127, 127));
}

}  // namespace

void fake_quantize_ternary(const TernaryArgs& args, int64_t begin, int64_t end) {
  const auto value = [&](float x, int64_t c) {
    return std::abs(x) > args.threshold[c] ? std::copysign(args.common.scale[c], x) : 0.0f;
  };
  for_each_element(args.common, begin, end, value, [](float, int64_t) { return true; });
}

void fake_quantize_binary(const BinaryArgs& args, int64_t begin, int64_t end) {
  const auto value = [&](float x, int64_t c) {
    return x >= 0.0f ? args.common.scale[c] : -args.common.scale[c];
  };
  for_each_element(args.common, begin, end, value,
                   [&](float x, int64_t) { return std::abs(x) <= args.clip; });
}

void fake_quantize_float(const FloatArgs& args, int64_t begin, int64_t end) {
  const auto scaled = [&](float x, int64_t c) { return product(x, 1.0f / args.common.scale[c]); };
  const auto value = [&](float x, int64_t c) {
    return nearest(args.format, scaled(x, c)) * args.common.scale[c];
  };
  for_each_element(args.common, begin, end, value, [&](float x, int64_t c) {
    return std::abs(scaled(x, c)) <= args.format.max_value;
  });
}

void fake_quantize_block_float(const BlockFloatArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t from = b * args.block, to = std::min(from + args.block, args.length);
    float amax = 0.0f;
    for (int64_t i = from; i < to; ++i) {
      if (std::abs(args.x[i]) > amax) amax = std::abs(args.x[i]);
    }
    const float scale = block_scale(args, std::min(amax, std::numeric_limits<float>::max()));
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = from; i < to; ++i) {
      const float x = args.x[i];
      args.y[i] = std::isnan(x) ? x : nearest(args.format, product(x, inverse)) * scale;
    }
  }
}

}  // namespace qtoolkit::kernels::reference
