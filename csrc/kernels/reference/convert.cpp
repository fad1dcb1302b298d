#include "kernels/convert.h"

#include <bit>
#include <cmath>
#include <cstdint>

namespace qtoolkit::kernels::reference {
namespace {

float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

uint16_t to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  const uint32_t upper = bits >> 16, rest = bits & 0xffffu;
  const bool up = rest > 0x8000u || (rest == 0x8000u && (upper & 1u) != 0);
  return static_cast<uint16_t>(upper + (up ? 1 : 0));
}

float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const int exponent = (bits >> 10) & 31;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 31) {
    const uint32_t quiet = fraction != 0 ? 0x400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13 | quiet);
  }
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return sign != 0 ? -magnitude : magnitude;
}

uint16_t to_float16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (std::isnan(x)) {
    return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  }
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  // The spacing of numbers is 2^-24 below 2^-13, and 2^-10 of the binade's start above. A sum that
  // reaches the next binade carries into the exponent.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int spacing = magnitude < 0x1p-13f ? -24 : exponent - 11;
  const auto steps = static_cast<uint32_t>(std::nearbyintf(std::ldexp(magnitude, -spacing)));
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(spacing + 24) << 10) + steps));
}

}  // namespace

void to_float(const ConvertArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.float_out[i] =
        args.bfloat16 ? from_bfloat16(args.half_in[i]) : from_float16(args.half_in[i]);
  }
}

void from_float(const ConvertArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    args.half_out[i] = args.bfloat16 ? to_bfloat16(args.float_in[i]) : to_float16(args.float_in[i]);
  }
}

}  // namespace qtoolkit::kernels::reference
