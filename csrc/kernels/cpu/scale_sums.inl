// From sums to results in plain C++ with vector types, compiled once for every baseline: the
// including file opens the path's namespace and defines QT_VECTOR_BYTES. No include guard and no
// includes, on purpose.

namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Ints = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
using Words = uint32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
using Codes = uint8_t __attribute__((vector_size(QT_VECTOR_BYTES / 4)));
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;

template <class Vector, class Element>
inline Vector load(const Element* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats to_float(Words sums) { return __builtin_convertvector((Ints)sums, Floats); }
inline float to_float(uint32_t sum) { return static_cast<float>(static_cast<int32_t>(sum)); }

struct Bounds {
  float low, high;
};

inline void store(const ScaleSumsArgs& args, Bounds bounds, int64_t to, Floats value) {
  if (args.y_codes == nullptr) {
    __builtin_memcpy(args.y + to, &value, sizeof value);
    return;
  }
  value = value == value ? value : Floats{};
  value = value < bounds.low ? Floats{} + bounds.low : value;
  value = value > bounds.high ? Floats{} + bounds.high : value;
  value = (value + 12582912.0f) - 12582912.0f;  // see round_small in rounding.h
  const Ints codes = __builtin_convertvector(value, Ints) + args.zero_point;
  const Codes bytes = __builtin_convertvector(codes, Codes);
  __builtin_memcpy(args.y_codes + to, &bytes, sizeof bytes);
}
inline void store(const ScaleSumsArgs& args, Bounds bounds, int64_t to, float value) {
  if (args.y_codes == nullptr) {
    args.y[to] = value;
    return;
  }
  const auto code = static_cast<int32_t>(round_between(value, bounds.low, bounds.high));
  args.y_codes[to] = static_cast<uint8_t>(code + args.zero_point);
}

template <Activation kActivation>
void scale_rows(const ScaleSumsArgs& args, int64_t begin, int64_t end) {
  const Bounds bounds = {static_cast<float>(args.lo - args.zero_point),
                         static_cast<float>(args.hi - args.zero_point)};
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* sums = args.sums + row * args.sums_row_stride;
    const auto factor = static_cast<uint32_t>(args.row_factor[row]);
    const auto term = static_cast<uint32_t>(args.row_term == nullptr ? 0 : args.row_term[row]);
    const float scale = args.row_scale[row];
    const auto columns = [&]<class Float, class Int, class Word>(int64_t c) {
      const Word acc = load<Word>(sums + c) + factor * load<Word>(args.column_term + c) + term;
      Float value = to_float(acc) * (load<Float>(args.column_scale + c) * scale);
      if (args.bias != nullptr) value += load<Float>(args.bias + c);
      store(args, bounds, row * args.y_row_stride + c, activate<kActivation, Float, Int>(value));
    };
    int64_t c = 0;
    for (; c + kLanes <= args.columns; c += kLanes) {
      columns.template operator()<Floats, Ints, Words>(c);
    }
    for (; c < args.columns; ++c) columns.template operator()<float, int32_t, uint32_t>(c);
  }
}

}  // namespace

void scale_sums(const ScaleSumsArgs& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::none:
      return scale_rows<Activation::none>(args, begin, end);
    case Activation::relu:
      return scale_rows<Activation::relu>(args, begin, end);
    case Activation::gelu:
      return scale_rows<Activation::gelu>(args, begin, end);
    case Activation::gelu_tanh:
      return scale_rows<Activation::gelu_tanh>(args, begin, end);
    case Activation::silu:
      return scale_rows<Activation::silu>(args, begin, end);
  }
}
