// Layer norm in plain C++, compiled once for every baseline: the including file opens the path's
// namespace. No include guard and no includes, on purpose.

namespace {

// Sums of a row's centred codes and of their squares, in blocks whose sums fit int32.
template <class Code>
LayerNormRow measure(const LayerNormArgs& args, const uint8_t* x) {
  constexpr int64_t kBlock = 16384;
  const int32_t zero_point = args.x_zero_point;
  int64_t sum = 0, squares = 0;
  for (int64_t begin = 0; begin < args.length; begin += kBlock) {
    const int64_t end = begin + kBlock < args.length ? begin + kBlock : args.length;
    int32_t block_sum = 0, block_squares = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t centred = static_cast<Code>(x[i]) - zero_point;
      block_sum += centred;
      block_squares += centred * centred;
    }
    sum += block_sum;
    squares += block_squares;
  }
  return layer_norm_row(args, sum, squares);
}

template <class Code>
void layer_norm_rows(const LayerNormArgs args, int64_t begin, int64_t end) {
  const float* const weight = args.weight;
  const float* const bias = args.bias;
  const int32_t zero_point = args.zero_point;
  const float low = static_cast<float>(args.lo - zero_point);
  const float high = static_cast<float>(args.hi - zero_point);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* const x = args.x + row * args.x_row_stride;
    const LayerNormRow r = measure<Code>(args, x);
    const auto value_at = [=](int64_t i) {
      const int32_t centred = static_cast<Code>(x[i]) - r.middle;
      return (static_cast<float>(centred) * r.a + r.b) * weight[i] + bias[i];
    };
    if (args.y_float != nullptr) {
      float* const y = args.y_float + row * args.y_row_stride;
      QT_INDEPENDENT_ITERATIONS
      for (int64_t i = 0; i < args.length; ++i) y[i] = value_at(i);
      continue;
    }
    uint8_t* const y = args.y + row * args.y_row_stride;
    QT_INDEPENDENT_ITERATIONS
    for (int64_t i = 0; i < args.length; ++i) {
      const float rounded = round_between(value_at(i), low, high);
      y[i] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + zero_point);
    }
  }
}

}  // namespace

void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  args.is_signed ? layer_norm_rows<int8_t>(args, begin, end)
                 : layer_norm_rows<uint8_t>(args, begin, end);
}
