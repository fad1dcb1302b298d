// Arithmetic on codes in plain C++, compiled once for every baseline: the including file opens the
// path's namespace. No include guard and no includes, on purpose.

namespace {

struct Output {
  int32_t zero_point;
  float low, high;

  uint8_t operator()(float value) const {
    const float rounded = round_between(value, low, high);
    return static_cast<uint8_t>(static_cast<int32_t>(rounded) + zero_point);
  }
};

template <class Args>
Output output_of(const Args& args) {
  return {args.zero_point, static_cast<float>(args.lo - args.zero_point),
          static_cast<float>(args.hi - args.zero_point)};
}

template <class X, bool kApart, bool kAddend>
void requantize_row(const RequantizeArgs& args, const uint8_t* x, uint8_t* y, int64_t count) {
  const int32_t x_zero_point = args.x_zero_point;
  const float* multiplier = args.multiplier;
  const float* addend = args.addend;
  const float first_multiplier = multiplier[0];
  const float first_addend = kAddend ? addend[0] : 0.0f;
  const Output output = output_of(args);
  QT_INDEPENDENT_ITERATIONS
  for (int64_t c = 0; c < count; ++c) {
    const int32_t centred = static_cast<X>(x[c]) - x_zero_point;
    float value = static_cast<float>(centred) * (kApart ? multiplier[c] : first_multiplier);
    if constexpr (kAddend) value += kApart ? addend[c] : first_addend;
    y[c] = output(value);
  }
}

using RequantizeRow = void(const RequantizeArgs&, const uint8_t*, uint8_t*, int64_t);

template <class X>
RequantizeRow* requantize_row_for(const RequantizeArgs& args) {
  if (args.channels_apart) {
    return args.addend != nullptr ? requantize_row<X, true, true> : requantize_row<X, true, false>;
  }
  return args.addend != nullptr ? requantize_row<X, false, true> : requantize_row<X, false, false>;
}

}  // namespace

void requantize(const RequantizeArgs& args, int64_t begin, int64_t end) {
  RequantizeRow* one_row =
      args.x_signed ? requantize_row_for<int8_t>(args) : requantize_row_for<uint8_t>(args);
  const bool gapless = args.x_row_stride == args.channels && args.y_row_stride == args.channels;
  if (gapless && !args.channels_apart) {  // one long row
    const int64_t offset = begin * args.channels;
    one_row(args, args.x + offset, args.y + offset, (end - begin) * args.channels);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    one_row(args, args.x + row * args.x_row_stride, args.y + row * args.y_row_stride,
            args.channels);
  }
}
