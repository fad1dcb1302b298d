// The quantize family in plain C++, compiled once for every baseline: the including file opens the
// path's namespace. No include guard and no includes, on purpose.

namespace {

struct Channel {
  float scale, inverse, low, high;
  int32_t zero_point;
};

inline Channel channel_at(const QuantizeArgs& args, int64_t c) {
  const int32_t zero_point = args.zero_point[c];
  return {args.scale[c], 1.0f / args.scale[c], static_cast<float>(args.quant_min - zero_point),
          static_cast<float>(args.quant_max - zero_point), zero_point};
}

// Calls body(i, channel) for elements whose channels lie side by side.
template <class Body>
inline void across_channels(const QuantizeArgs args, int64_t begin, int64_t end, Body body) {
  while (begin < end) {
    const int64_t c = begin % args.channels;
    const int64_t rest = args.channels - c;
    const int64_t count = rest < end - begin ? rest : end - begin;
    QT_INDEPENDENT_ITERATIONS
    for (int64_t k = 0; k < count; ++k) body(begin + k, channel_at(args, c + k));
    begin += count;
  }
}

// Calls body(i, channel) for every element, in loops that vectorise: along a channel's run of
// elements, or across channels. args is a copy, which a store of bytes cannot change.
template <class Body>
inline void for_each_element(QuantizeArgs args, int64_t begin, int64_t end, Body body) {
  if (args.channels == 1) {
    const Channel channel = channel_at(args, 0);
    QT_INDEPENDENT_ITERATIONS
    for (int64_t i = begin; i < end; ++i) body(i, channel);
  } else if (args.inner == 1) {
    // Few channels are written down repeatedly: loops over 3 elements took 6 times as long.
    constexpr int64_t kLoop = 64;
    float scale[2 * kLoop];
    int32_t zero_point[2 * kLoop];
    if (args.channels < kLoop && end - begin > 4 * kLoop) {
      int64_t filled = 0;
      while (filled < kLoop) {
        for (int64_t c = 0; c < args.channels; ++c, ++filled) {
          scale[filled] = args.scale[c];
          zero_point[filled] = args.zero_point[c];
        }
      }
      args.channels = filled;
      args.scale = scale;
      args.zero_point = zero_point;
    }
    across_channels(args, begin, end, body);
  } else {
    while (begin < end) {
      const int64_t row_end = (begin / args.inner + 1) * args.inner;
      const int64_t run_end = row_end < end ? row_end : end;
      const Channel channel = channel_at(args, begin / args.inner % args.channels);
      QT_INDEPENDENT_ITERATIONS
      for (int64_t i = begin; i < run_end; ++i) body(i, channel);
      begin = run_end;
    }
  }
}

template <class Code>
void dequantize_codes(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const uint8_t* codes = args.codes;
  float* y = args.y;
  for_each_element(args, begin, end, [=](int64_t i, const Channel& channel) {
    const int32_t code = static_cast<Code>(codes[i]);
    y[i] = static_cast<float>(code - channel.zero_point) * channel.scale;
  });
}

}  // namespace

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const float* x = args.x;
  uint8_t* y = args.y_codes;
  for_each_element(args, begin, end, [=](int64_t i, const Channel& channel) {
    const float rounded = round_between(x[i] * channel.inverse, channel.low, channel.high);
    y[i] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + channel.zero_point);
  });
}

void dequantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  if (args.quant_min < 0) {
    dequantize_codes<int8_t>(args, begin, end);
  } else {
    dequantize_codes<uint8_t>(args, begin, end);
  }
}
