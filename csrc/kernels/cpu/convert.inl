// Conversions in plain C++, compiled once for every baseline: the including file opens the path's
// namespace and defines
//   void float16_to_float(const uint16_t*, float*, int64_t count)
//   void float_to_float16(const float*, uint16_t*, int64_t count).
// No include guard and no includes, on purpose.

namespace {

void bfloat16_to_float(const uint16_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = __builtin_bit_cast(float, static_cast<uint32_t>(x[i]) << 16);
  }
}

void float_to_bfloat16(const float* x, uint16_t* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = __builtin_bit_cast(uint32_t, x[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    y[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}

}  // namespace

void to_float(const ConvertArgs& args, int64_t begin, int64_t end) {
  const auto convert = args.bfloat16 ? bfloat16_to_float : float16_to_float;
  convert(args.half_in + begin, args.float_out + begin, end - begin);
}

void from_float(const ConvertArgs& args, int64_t begin, int64_t end) {
  const auto convert = args.bfloat16 ? float_to_bfloat16 : float_to_float16;
  convert(args.float_in + begin, args.half_out + begin, end - begin);
}
