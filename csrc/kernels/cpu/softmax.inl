// Softmax in plain C++, compiled once for every baseline: the including file opens the path's
// namespace. No include guard and no includes, on purpose.

namespace {

constexpr int64_t kParts = 16;

inline float sum_of(float* part) {
  for (int64_t half = kParts / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) part[k] += part[k + half];
  }
  return part[0];
}

// `exponential` holds table.at() of every difference; flip makes codes unsigned.
void softmax_row(const SoftmaxArgs& args, const float* exponential, const uint8_t* x, int64_t row) {
  const int64_t length = args.length;
  const uint8_t flip = args.is_signed ? 0x80 : 0;
  uint8_t largest = 0;
  for (int64_t i = 0; i < length; ++i) {
    const uint8_t code = x[i] ^ flip;
    largest = code > largest ? code : largest;
  }
  // max - x in unsigned codes; the bit that flip turns is turned in both.
  largest ^= flip;
  const auto value_at = [=](int64_t i) {
    return exponential[static_cast<uint8_t>(largest - x[i])];
  };
  float part[kParts] = {};
  const int64_t whole = length / kParts * kParts;
  for (int64_t i = 0; i < whole; i += kParts) {
    for (int64_t k = 0; k < kParts; ++k) part[k] += value_at(i + k);
  }
  for (int64_t i = whole; i < length; ++i) part[i - whole] += value_at(i);
  const float sum = sum_of(part);
  if (args.y_float != nullptr) {
    const float factor = 1.0f / sum;
    float* const y = args.y_float + row * args.y_row_stride;
    for (int64_t i = 0; i < length; ++i) y[i] = value_at(i) * factor;
    return;
  }
  // There are 256 results at most.
  const float factor = 1.0f / (sum * args.y_scale);
  const int32_t zero_point = args.zero_point;
  const float low = static_cast<float>(args.lo - zero_point);
  const float high = static_cast<float>(args.hi - zero_point);
  const auto code_of = [=](float value) {
    const float rounded = round_between(value * factor, low, high);
    return static_cast<uint8_t>(static_cast<int32_t>(rounded) + zero_point);
  };
  uint8_t* const y = args.y + row * args.y_row_stride;
  uint8_t codes[256];
  if (length >= 256) {
    for (int64_t d = 0; d < 256; ++d) codes[d] = code_of(exponential[d]);
    for (int64_t i = 0; i < length; ++i) y[i] = codes[static_cast<uint8_t>(largest - x[i])];
  } else {
    for (int64_t i = 0; i < length; ++i) y[i] = code_of(value_at(i));
  }
}

}  // namespace

void softmax(const SoftmaxArgs& shared, int64_t begin, int64_t end) {
  const SoftmaxArgs args = shared;  // a copy, which a store of bytes cannot change
  float exponential[256];
  for (int32_t d = 0; d < 256; ++d) {
    exponential[d] = args.table.high[d >> 4] * args.table.low[d & 15];
  }
  for (int64_t row = begin; row < end; ++row) {
    softmax_row(args, exponential, args.x + row * args.x_row_stride, row);
  }
}
