#include "kernels/quantize.h"

#include <cstdint>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

int64_t channel_of(const QuantizeArgs& args, int64_t i) {
  return args.channels == 1 ? 0 : i / args.inner % args.channels;
}

int32_t code_of(const QuantizeArgs& args, int64_t i) {
  const int64_t c = channel_of(args, i);
  return quantize_value(args.x[i], 1.0f / args.scale[c], args.zero_point[c], args.quant_min,
                        args.quant_max);
}

}  // namespace

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) args.y_codes[i] = static_cast<uint8_t>(code_of(args, i));
}

void dequantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = channel_of(args, i);
    const int32_t code = args.quant_min < 0 ? static_cast<int8_t>(args.codes[i]) : args.codes[i];
    args.y[i] = dequantize_value(code, args.scale[c], args.zero_point[c]);
  }
}

}  // namespace qtoolkit::kernels::reference
