// Images of floats to images of codes and back in plain C++, compiled once for every baseline: the
// including file opens the path's namespace. No include guard and no includes, on purpose.

namespace {

struct Rule {
  float inverse, low, high;
  int32_t zero_point;
};

inline Rule rule_of(const QuantizeImageArgs& args) {
  return {1.0f / args.scale, static_cast<float>(args.quant_min - args.zero_point),
          static_cast<float>(args.quant_max - args.zero_point), args.zero_point};
}

inline uint8_t code_of(float x, const Rule& rule) {
  const float rounded = round_between(x * rule.inverse, rule.low, rule.high);
  return static_cast<uint8_t>(static_cast<int32_t>(rounded) + rule.zero_point);
}

// kChannels planes to pixels without gaps. One plane also is a row whose channels lie side by side
// on both sides.
template <int64_t kChannels>
void quantize_planes(const float* x, int64_t channel_stride, int64_t count, const Rule rule,
                     uint8_t* y) {
  QT_INDEPENDENT_ITERATIONS
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t c = 0; c < kChannels; ++c) {
      y[j * kChannels + c] = code_of(x[c * channel_stride + j], rule);
    }
  }
}

// Anything else: a block of pixels of one channel is brought together, converted in a loop that
// vectorises, and spread again.
constexpr int64_t kBlock = 128;

void quantize_any_row(const QuantizeImageArgs& args, const Rule rule, const float* x, uint8_t* y) {
  float values[kBlock];
  uint8_t codes[kBlock];
  for (int64_t begin = 0; begin < args.width; begin += kBlock) {
    const int64_t rest = args.width - begin;
    const int64_t count = rest < kBlock ? rest : kBlock;
    for (int64_t c = 0; c < args.channels; ++c) {
      const float* from = x + c * args.x_channel_stride + begin * args.x_column_stride;
      if (args.x_column_stride != 1) {
        for (int64_t j = 0; j < count; ++j) values[j] = from[j * args.x_column_stride];
        from = values;
      }
      for (int64_t j = 0; j < count; ++j) codes[j] = code_of(from[j], rule);
      uint8_t* const to = y + begin * args.y_pixel_stride + c;
      for (int64_t j = 0; j < count; ++j) to[j * args.y_pixel_stride] = codes[j];
    }
  }
}

inline void quantize_row(const QuantizeImageArgs& args, const Rule rule, const float* x,
                         uint8_t* y) {
  if (args.y_pixel_stride == args.channels) {
    if (args.x_channel_stride == 1 && args.x_column_stride == args.channels) {
      return quantize_planes<1>(x, 0, args.width * args.channels, rule, y);
    }
    if (args.x_column_stride == 1) {
      const int64_t stride = args.x_channel_stride, width = args.width;
      if (args.channels == 1) return quantize_planes<1>(x, stride, width, rule, y);
      if (args.channels == 2) return quantize_planes<2>(x, stride, width, rule, y);
      if (args.channels == 3) return quantize_planes<3>(x, stride, width, rule, y);
      if (args.channels == 4) return quantize_planes<4>(x, stride, width, rule, y);
    }
  }
  quantize_any_row(args, rule, x, y);
}

template <class Code>
void dequantize_row(const DequantizeImageArgs& args, const uint8_t* x, float* y) {
  const float scale = args.scale;
  const int32_t zero_point = args.zero_point;
  const auto convert = [=](const uint8_t* codes, int64_t count, float* values) {
    for (int64_t j = 0; j < count; ++j) {
      values[j] = static_cast<float>(static_cast<Code>(codes[j]) - zero_point) * scale;
    }
  };
  if (args.y_channel_stride == 1 && args.y_column_stride == args.channels &&
      args.x_pixel_stride == args.channels) {
    return convert(x, args.width * args.channels, y);
  }
  float values[kBlock];
  uint8_t codes[kBlock];
  for (int64_t begin = 0; begin < args.width; begin += kBlock) {
    const int64_t rest = args.width - begin;
    const int64_t count = rest < kBlock ? rest : kBlock;
    for (int64_t c = 0; c < args.channels; ++c) {
      const uint8_t* const from = x + begin * args.x_pixel_stride + c;
      for (int64_t j = 0; j < count; ++j) codes[j] = from[j * args.x_pixel_stride];
      float* const to = y + c * args.y_channel_stride + begin * args.y_column_stride;
      if (args.y_column_stride == 1) {
        convert(codes, count, to);
      } else {
        convert(codes, count, values);
        for (int64_t j = 0; j < count; ++j) to[j * args.y_column_stride] = values[j];
      }
    }
  }
}

}  // namespace

void quantize_image(const QuantizeImageArgs& args, int64_t begin, int64_t end) {
  const Rule rule = rule_of(args);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, i = row % args.height;
    quantize_row(args, rule, args.x + n * args.x_image_stride + i * args.x_row_stride,
                 args.y + n * args.y_image_stride + i * args.y_row_stride);
  }
}

void dequantize_image(const DequantizeImageArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, i = row % args.height;
    const uint8_t* const x = args.x + n * args.x_image_stride + i * args.x_row_stride;
    float* const y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    args.is_signed ? dequantize_row<int8_t>(args, x, y) : dequantize_row<uint8_t>(args, x, y);
  }
}
