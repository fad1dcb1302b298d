// Fake-quantize to few values in plain C++, compiled once for every baseline: the including file
// opens the path's namespace. No include guard and no includes, on purpose.

namespace {

constexpr int64_t kChunk = 256;  // elements that are computed together
constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7f800000u;

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// With masks, because GCC 12 makes a branch of a condition in these loops, and then does not
// vectorise them.
inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// Two parameters for each element of a chunk.
struct Table {
  float first[kChunk], second[kChunk];
  int64_t channel = -1;  // whose parameters fill it, -1 for several

  // Writes those of elements [i, i + count); of_channel(c) gives a pair.
  template <class Parameters>
  void fill(const LowBitArgs& args, int64_t i, int64_t count, const Parameters& of_channel) {
    int64_t c = args.channels == 1 ? 0 : i / args.inner % args.channels;
    int64_t left = args.channels == 1 ? count : args.inner - i % args.inner;
    if (left >= count) {
      if (channel != c) put(0, kChunk, of_channel(c));
      channel = c;
      return;
    }
    channel = -1;
    for (int64_t k = 0; k < count; k += left, left = args.inner) {
      if (k > 0) c = c + 1 == args.channels ? 0 : c + 1;
      const int64_t run = left < count - k ? left : count - k;
      put(k, k + run, of_channel(c));
    }
  }

 private:
  template <class Pair>
  void put(int64_t from, int64_t to, const Pair& pair) {
    for (int64_t k = from; k < to; ++k) {
      first[k] = pair.first;
      second[k] = pair.second;
    }
  }
};

struct Parameters {
  float first, second;
};

// Bytes that are 0 or 1 to bits, least first.
inline void pack(const uint8_t* flags, int64_t count, uint8_t* mask) {
  for (int64_t k = 0; k < count; k += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, flags + k, sizeof eight);
    mask[k / 8] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

// Calls rule(x, first, second, passes) for every element. of_channel(c) gives first and second.
template <class OfChannel, class Rule>
inline void for_each_chunk(const LowBitArgs& args, int64_t begin, int64_t end,
                           const OfChannel& of_channel, const Rule& rule) {
  Table table;
  uint8_t flags[kChunk + 8];
  for (; begin < end; begin += kChunk) {
    const int64_t count = end - begin < kChunk ? end - begin : kChunk;
    table.fill(args, begin, count, of_channel);
    const float* x = args.x + (begin - args.first);
    float* y = args.y + (begin - args.first);
    QT_INDEPENDENT_ITERATIONS
    for (int64_t k = 0; k < count; ++k) {
      bool passes = true;
      y[k] = rule(x[k], table.first[k], table.second[k], passes);
      flags[k] = passes;
    }
    if (args.mask == nullptr) continue;
    for (int64_t k = count; k % 8 != 0; ++k) flags[k] = 0;
    pack(flags, count, args.mask + begin / 8);
  }
}

// FloatFormat with what rounding needs.
struct Rounding {
  explicit Rounding(const FloatFormat& format)
      : shift(23 - format.mantissa_bits),
        half((1u << shift >> 1) - 1),
        min_normal(power(format.min_exponent)),
        magic(power(format.min_exponent - format.mantissa_bits + 23)),
        max_value(format.max_value) {}

  static float power(int32_t exponent) {
    return float_of(static_cast<uint32_t>(exponent + 127) << 23);
  }

  // The bits of the format's number nearest to a >= 0.
  uint32_t nearest(float a) const {
    const float size = a > max_value ? max_value : a;
    const uint32_t bits = bits_of(size);
    const uint32_t normal = (bits + half + (bits >> shift & 1u)) >> shift << shift;
    // Floats from magic on have the step of the format's subnormals.
    const float subnormal = (size + magic) - magic;
    return select(size >= min_normal, normal, bits_of(subnormal));
  }

  uint32_t shift, half;
  float min_normal, magic, max_value;
};

// scale times the format's number nearest to x * inverse; NaN for NaN.
inline float round_float(const Rounding& rounding, float x, float scale, float inverse,
                         bool& passes) {
  const uint32_t scaled = bits_of(x * inverse) & ~kSign;
  const float size = float_of(select(scaled <= kInfinity, scaled, 0));  // 0 times infinity is 0
  const uint32_t sign = bits_of(x) & kSign;
  const float result = float_of(rounding.nearest(size) | sign) * scale;
  passes = (size <= rounding.max_value) & (x == x);
  return float_of(select(x == x, bits_of(result), bits_of(x)));
}

// The bits of the largest |x| that is not NaN, as if no float were beyond FLT_MAX.
inline float largest(const float* x, int64_t count) {
  int32_t top = 0;
  for (int64_t k = 0; k < count; ++k) {
    const auto bits = static_cast<int32_t>(bits_of(x[k]) & ~kSign);
    const int32_t number = bits > static_cast<int32_t>(kInfinity) ? 0 : bits;
    top = number > top ? number : top;
  }
  const float amax = float_of(static_cast<uint32_t>(top));
  return amax > __FLT_MAX__ ? __FLT_MAX__ : amax;
}

inline int32_t exponent_of(float x) { return static_cast<int32_t>(bits_of(x) >> 23) - 127; }

inline float block_scale(const BlockFloatArgs& args, float amax) {
  if (args.tensor_scale != 0.0f) {
    const Rounding e4m3(FloatFormat{.mantissa_bits = 3, .min_exponent = -6, .max_value = 448.0f});
    return float_of(e4m3.nearest(amax / args.format.max_value / args.tensor_scale)) *
           args.tensor_scale;
  }
  // That of a subnormal amax is -127, which the clamp gives as well.
  const int32_t exponent = exponent_of(amax) - exponent_of(args.format.max_value);
  return exponent <= -127 ? 0x1p-127f : Rounding::power(exponent > 127 ? 127 : exponent);
}

}  // namespace

void fake_quantize_ternary(const TernaryArgs& args, int64_t begin, int64_t end) {
  const float* scale = args.common.scale;
  const float* threshold = args.threshold;
  for_each_chunk(
      args.common, begin, end,
      [=](int64_t c) {
        return Parameters{scale[c], threshold[c]};
      },
      [](float x, float scale_of_x, float threshold_of_x, bool& passes) {
        passes = x == x;
        const uint32_t sign = bits_of(x) & kSign;
        const float size = float_of(bits_of(x) & ~kSign);
        const uint32_t value = select(size > threshold_of_x, bits_of(scale_of_x) | sign, 0);
        return float_of(select(x == x, value, bits_of(x)));
      });
}

void fake_quantize_binary(const BinaryArgs& args, int64_t begin, int64_t end) {
  const float* scale = args.common.scale;
  const float clip = args.clip;
  for_each_chunk(
      args.common, begin, end,
      [=](int64_t c) {
        return Parameters{scale[c], 0.0f};
      },
      [=](float x, float scale_of_x, float, bool& passes) {
        const uint32_t bits = bits_of(scale_of_x);
        passes = float_of(bits_of(x) & ~kSign) <= clip;
        return float_of(select(x == x, select(x >= 0.0f, bits, bits ^ kSign), bits_of(x)));
      });
}

void fake_quantize_float(const FloatArgs& args, int64_t begin, int64_t end) {
  const float* scale = args.common.scale;
  const Rounding rounding(args.format);
  for_each_chunk(
      args.common, begin, end,
      [=](int64_t c) {
        return Parameters{scale[c], 1.0f / scale[c]};
      },
      [=](float x, float scale_of_x, float inverse, bool& passes) {
        return round_float(rounding, x, scale_of_x, inverse, passes);
      });
}

void fake_quantize_block_float(const BlockFloatArgs& args, int64_t begin, int64_t end) {
  const Rounding rounding(args.format);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t from = b * args.block, rest = args.length - from;
    const int64_t count = rest < args.block ? rest : args.block;
    const float* x = args.x + from;
    float* y = args.y + from;
    const float scale = block_scale(args, largest(x, count));
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    QT_INDEPENDENT_ITERATIONS
    for (int64_t k = 0; k < count; ++k) {
      bool passes;
      y[k] = round_float(rounding, x[k], scale, inverse, passes);
    }
  }
}
