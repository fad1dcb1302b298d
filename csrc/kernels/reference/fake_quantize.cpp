#include "kernels/fake_quantize.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

int64_t channel_of(const FakeQuantizeArgs& args, int64_t i) {
  if (args.channels == 1) return 0;
  const int64_t groups = (args.inner + args.group - 1) / args.group;
  return (i / args.inner * groups + i % args.inner / args.group) % args.channels;
}

bool bit_at(const uint8_t* mask, int64_t i) { return ((mask[i / 8] >> (i % 8)) & 1) != 0; }

template <class Bits>
void mask_bits(const MaskGradientArgs& args, int64_t begin, int64_t end) {
  const auto* grad = static_cast<const Bits*>(args.grad);
  auto* y = static_cast<Bits*>(args.y);
  for (int64_t i = begin; i < end; ++i) y[i] = bit_at(args.mask, i) ? grad[i] : Bits{0};
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args, int64_t begin, int64_t end) {
  if (args.mask != nullptr) std::memset(args.mask + begin / 8, 0, (end - begin + 7) / 8);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = channel_of(args, i);
    const float scale = args.scale[c];
    const int32_t zero_point = args.zero_point[c];
    const float input = args.x[i - args.first];
    const float x = args.relu && input < 0.0f ? 0.0f : input;
    args.y[i - args.first] = std::isnan(x)
                                 ? x
                                 : dequantize_value(quantize_value(x, 1.0f / scale, zero_point,
                                                                   args.quant_min, args.quant_max),
                                                    scale, zero_point);
    const float rounded = round_half_even(x * (1.0f / scale));
    const bool inside = rounded >= static_cast<float>(args.quant_min - zero_point) &&
                        rounded <= static_cast<float>(args.quant_max - zero_point) &&
                        (!args.relu || input > 0.0f);
    if (args.mask != nullptr && inside) args.mask[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
  }
}

void mask_gradient(const MaskGradientArgs& args, int64_t begin, int64_t end) {
  if (args.element_bytes == 2) {
    mask_bits<uint16_t>(args, begin, end);
  } else {
    mask_bits<uint32_t>(args, begin, end);
  }
}

}  // namespace qtoolkit::kernels::reference
