// Quantization of rows in plain C++ with vector types, compiled once for every baseline: the
// including file opens the path's namespace and defines QT_VECTOR_BYTES. No include guard and no
// includes, on purpose.

namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Ints = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;
constexpr int64_t kUnroll = 4;  // hides the latency of min and max

// The bits of the least magnitude that is not finite; as integers, magnitudes are in order.
constexpr int32_t kInfinityBits = 0x7f800000;

// The least and greatest of the values and 0, and the bits of the greatest magnitude.
template <class Float, class Int>
struct Extremes {
  Float low = {}, high = {};
  Int magnitude = {};

  inline void take(Float x) { merge(x, x, __builtin_bit_cast(Int, x) & 0x7fffffff); }
  inline void merge(Float other_low, Float other_high, Int other_magnitude) {
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
    magnitude = other_magnitude > magnitude ? other_magnitude : magnitude;
  }
};

// Over the lanes of a vector, whose halves are merged again and again.
inline Extremes<float, int32_t> over_lanes(const Extremes<Floats, Ints>& vector) {
  float low[kLanes], high[kLanes];
  int32_t magnitude[kLanes];
  __builtin_memcpy(low, &vector.low, sizeof low);
  __builtin_memcpy(high, &vector.high, sizeof high);
  __builtin_memcpy(magnitude, &vector.magnitude, sizeof magnitude);
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < half; ++k) {
      low[k] = low[k + half] < low[k] ? low[k + half] : low[k];
      high[k] = high[k + half] > high[k] ? high[k + half] : high[k];
      magnitude[k] = magnitude[k + half] > magnitude[k] ? magnitude[k + half] : magnitude[k];
    }
  }
  return {low[0], high[0], magnitude[0]};
}

inline Extremes<float, int32_t> extremes_of(const float* x, int64_t count) {
  Extremes<Floats, Ints> vectors[kUnroll];
  int64_t i = 0;
  for (; i + kLanes * kUnroll <= count; i += kLanes * kUnroll) {
    for (int64_t u = 0; u < kUnroll; ++u) {
      Floats values;
      __builtin_memcpy(&values, x + i + u * kLanes, sizeof values);
      vectors[u].take(values);
    }
  }
  for (int64_t u = 1; u < kUnroll; ++u) {
    vectors[0].merge(vectors[u].low, vectors[u].high, vectors[u].magnitude);
  }
  Extremes<float, int32_t> result = over_lanes(vectors[0]);
  for (; i < count; ++i) result.take(x[i]);
  return result;
}

inline void quantize_row(const float* x, int64_t count, float inverse, int32_t zero_point,
                         uint8_t* codes) {
  const float low = static_cast<float>(-zero_point);
  const float high = static_cast<float>(255 - zero_point);
  QT_INDEPENDENT_ITERATIONS
  for (int64_t i = 0; i < count; ++i) {
    const float rounded = round_between(x[i] * inverse, low, high);
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + zero_point);
  }
}

// range_to_qparams of core/value_range.h, affine with codes in [0, 255], for a range that holds 0.
inline void choose_qparams(float low, float high, float& scale, int32_t& zero_point) {
  constexpr float kSmallest = 0x1p-100f;
  float step = (high - low) / 255.0f;
  step = step < kSmallest && step != 0.0f ? kSmallest : step;
  step = step > __FLT_MAX__ ? __FLT_MAX__ : step;
  scale = step == 0.0f ? __FLT_EPSILON__ : step;
  // low / scale is in [-255, 0], but for a scale that was kept below infinity: then in [-1, 0].
  zero_point = static_cast<int32_t>(0.0f - round_small(low / scale));
  zero_point = zero_point > 255 ? 255 : zero_point;
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.x_row_stride;
    uint8_t* codes = args.codes + row * args.codes_row_stride;
    const Extremes<float, int32_t> extremes = extremes_of(x, args.width);
    if (extremes.magnitude >= kInfinityBits) {
      args.scale[row] = __builtin_nanf("");
      args.zero_point[row] = 0;
      __builtin_memset(codes, 0, static_cast<size_t>(args.width));
      continue;
    }
    choose_qparams(extremes.low, extremes.high, args.scale[row], args.zero_point[row]);
    quantize_row(x, args.width, 1.0f / args.scale[row], args.zero_point[row], codes);
  }
}
