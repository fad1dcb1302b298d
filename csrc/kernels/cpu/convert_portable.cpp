#include "kernels/convert.h"

namespace qtoolkit::kernels::portable {
namespace {

// Without branches, so that the loops vectorise, and without subnormal float32 operands, which a
// program may have set to be taken for 0.

void float16_to_float(const uint16_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t sign = static_cast<uint32_t>(x[i] & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x[i] & 0x7fffu) << 13;
    const uint32_t normal = magnitude + (112u << 23);
    // 2^-14 * (1 + fraction) - 2^-14
    const float subnormal =
        __builtin_bit_cast(float, magnitude + (113u << 23)) - __builtin_bit_cast(float, 113u << 23);
    const uint32_t quiet = magnitude > 0x0f800000u ? 0x400000u : 0u;
    uint32_t result = magnitude < (1u << 23) ? __builtin_bit_cast(uint32_t, subnormal) : normal;
    result = magnitude >= 0x0f800000u ? (magnitude + (224u << 23)) | quiet : result;
    y[i] = __builtin_bit_cast(float, sign | result);
  }
}

void float_to_float16(const float* x, uint16_t* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = __builtin_bit_cast(uint32_t, x[i]);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // 0.5 + x, whose spacing is 2^-24, the one of subnormal float16.
    const uint32_t subnormal =
        __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) -
        __builtin_bit_cast(uint32_t, 0.5f);
    const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= (143u << 23) ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? nan : result;
    y[i] = static_cast<uint16_t>(sign | result);
  }
}

}  // namespace
#include "kernels/cpu/convert.inl"
}  // namespace qtoolkit::kernels::portable
