// Batch norm in plain C++ with vector types, compiled once for every baseline: the including file
// opens the path's namespace, and defines QT_VECTOR_BYTES, QT_CHANNEL_GROUP, the
// vector types, and the functions multiply_add, bits_of and masks_of. No include guard and no
// includes, on purpose.

namespace {

constexpr int64_t kStep = kBatchNormStep;
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;
constexpr int64_t kVectors = kStep / kLanes;  // in a step
using HalfFloats = float __attribute__((vector_size(QT_VECTOR_BYTES / 2)));

constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

template <class Vector, class T>
inline Vector load(const T* from) {
  Vector result;
  __builtin_memcpy(&result, from, sizeof result);
  return result;
}

template <class Vector, class T>
inline void store(T* to, const Vector& vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

inline Floats splat(float value) { return value - Floats{}; }

// Adds each half of `values` to a vector of doubles.
inline void add_to(Doubles* sums, const Floats& values) {
  HalfFloats half[2];
  __builtin_memcpy(half, &values, sizeof half);
  sums[0] += __builtin_convertvector(half[0], Doubles);
  sums[1] += __builtin_convertvector(half[1], Doubles);
}

inline void add_product_to(Doubles* sums, const Floats& a, const Floats& b) {
  HalfFloats half_a[2], half_b[2];
  __builtin_memcpy(half_a, &a, sizeof half_a);
  __builtin_memcpy(half_b, &b, sizeof half_b);
  for (int64_t h = 0; h < 2; ++h) {
    sums[h] = multiply_add(__builtin_convertvector(half_a[h], Doubles),
                           __builtin_convertvector(half_b[h], Doubles), sums[h]);
  }
}

// --- sums ---------------------------------------------------------------------------------------

struct Statistics {
  double *sum, *squares;
  float *minimum, *maximum;

  void take(int64_t r, float x) const {
    sum[r] += double{x};
    squares[r] += double{x} * double{x};
    x += 0.0f;
    minimum[r] = x < minimum[r] ? x : minimum[r];
    maximum[r] = x > maximum[r] ? x : maximum[r];
  }
};

// Takes `rows` rows of `channels` = kGroup * kLanes elements, `stride` elements apart.
template <int64_t kGroup>
void take_rows(const float* x, int64_t stride, int64_t rows, const Statistics& to) {
  Doubles sum[2 * kGroup], squares[2 * kGroup];
  Floats minimum[kGroup], maximum[kGroup];
  __builtin_memcpy(sum, to.sum, sizeof sum);
  __builtin_memcpy(squares, to.squares, sizeof squares);
  __builtin_memcpy(minimum, to.minimum, sizeof minimum);
  __builtin_memcpy(maximum, to.maximum, sizeof maximum);
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    for (int64_t g = 0; g < kGroup; ++g) {
      const auto value = load<Floats>(x + g * kLanes);
      add_to(sum + 2 * g, value);
      add_product_to(squares + 2 * g, value, value);
      minimum[g] = value < minimum[g] ? value : minimum[g];
      maximum[g] = value > maximum[g] ? value : maximum[g];
    }
  }
  __builtin_memcpy(to.sum, sum, sizeof sum);
  __builtin_memcpy(to.squares, squares, sizeof squares);
  __builtin_memcpy(to.minimum, minimum, sizeof minimum);
  __builtin_memcpy(to.maximum, maximum, sizeof maximum);
}

constexpr int64_t kGroupVectors = QT_CHANNEL_GROUP / kLanes;
// Rows whose elements stay in L1 while the groups of channels take turns.
inline int64_t rows_together(int64_t channels) {
  constexpr int64_t kElements = 4096;
  const int64_t rows = kElements / channels;
  return rows < 8 ? 8 : rows;
}

void take_row_part(const BatchNormStatisticsArgs& args, int64_t part) {
  const int64_t channels = args.channels, first = part * channels;
  const Statistics to = {args.sum + first, args.squares + first, args.minimum + first,
                         args.maximum + first};
  const int64_t begin = part * args.part_rows;
  const int64_t end = begin + args.part_rows < args.outer ? begin + args.part_rows : args.outer;
  const int64_t together = rows_together(channels);
  for (int64_t row = begin; row < end; row += together) {
    const int64_t rows = end - row < together ? end - row : together;
    const float* x = args.x + row * channels;
    int64_t c = 0;
    const auto at = [&](int64_t channel) {
      return Statistics{to.sum + channel, to.squares + channel, to.minimum + channel,
                        to.maximum + channel};
    };
    for (; c + QT_CHANNEL_GROUP <= channels; c += QT_CHANNEL_GROUP) {
      take_rows<kGroupVectors>(x + c, channels, rows, at(c));
    }
    for (; c + kLanes <= channels; c += kLanes) take_rows<1>(x + c, channels, rows, at(c));
    for (int64_t k = 0; k < rows && c < channels; ++k) {
      for (int64_t rest = c; rest < channels; ++rest) to.take(rest, x[k * channels + rest]);
    }
  }
}

inline double sum_of(const double* lanes) {
  double sum = lanes[0];
  for (int64_t k = 1; k < kStep; ++k) sum += lanes[k];
  return sum;
}

// --- elements with a channel's numbers ----------------------------------------------------------

// Calls body(i, count, numbers) for every step of [begin, end): count is kStep but in the last
// step, and numbers[p][k] is parameters[p] of element i + k's channel.
template <int64_t kParameters, class View, class Body>
void for_each_step(const View& view, const float* const (&parameters)[kParameters], int64_t begin,
                   int64_t end, const Body& body) {
  const float* numbers[kParameters];
  if (view.inner == 1) {
    int64_t phase = begin % view.period;
    for (int64_t i = begin; i < end; i += kStep) {
      for (int64_t p = 0; p < kParameters; ++p) numbers[p] = parameters[p] + phase;
      body(i, end - i < kStep ? end - i : kStep, numbers);
      phase += kStep;
      phase = phase >= view.period ? phase - view.period : phase;
    }
    return;
  }
  float local[kParameters][kStep];
  for (int64_t p = 0; p < kParameters; ++p) numbers[p] = local[p];
  int64_t i = begin;
  while (i < end) {
    const int64_t row = i / view.inner, row_end = (row + 1) * view.inner;
    for (int64_t p = 0; p < kParameters; ++p) {
      const float number = parameters[p][row % view.channels];
      for (int64_t k = 0; k < kStep; ++k) local[p][k] = number;
    }
    for (; i + kStep <= row_end && i + kStep <= end; i += kStep) body(i, kStep, numbers);
    if (i >= row_end || i >= end) continue;
    // This step holds the end of the row, or of everything.
    const int64_t count = end - i < kStep ? end - i : kStep;
    int64_t c = row % view.channels, left = row_end - i;
    for (int64_t k = 0; k < count; ++k, --left) {
      if (left == 0) {
        c = c + 1 == view.channels ? 0 : c + 1;
        left = view.inner;
      }
      for (int64_t p = 0; p < kParameters; ++p) local[p][k] = parameters[p][c];
    }
    body(i, count, numbers);
    i += kStep;
  }
}

// `count` elements in the memory of a whole step, the others zero.
struct PartialStep {
  float values[kStep] = {};
  PartialStep(const float* from, int64_t count) {
    for (int64_t k = 0; from != nullptr && k < count; ++k) values[k] = from[k];
  }
  void store_to(float* to, int64_t count) const {
    for (int64_t k = 0; k < count; ++k) to[k] = values[k];
  }
};

template <bool kResidual>
inline Floats normalized(const float* x, const float* residual, const float* factor,
                         const float* addend) {
  Floats z = load<Floats>(x) * load<Floats>(factor);
  z = z + load<Floats>(addend);
  if constexpr (kResidual) z = z + load<Floats>(residual);
  return z;
}

// x clamped to [low, high]; NaN stays.
inline Floats between(Floats x, const Floats& low, const Floats& high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <bool kResidual, bool kQuantized>
void act(const BatchNormArgs& args, int64_t begin, int64_t end) {
  const Floats lower = splat(args.lower), upper = splat(args.upper);
  const Floats inverse = splat(1.0f / args.scale), scale = splat(args.scale);
  const Floats low = splat(static_cast<float>(args.quant_min - args.zero_point));
  const Floats high = splat(static_cast<float>(args.quant_max - args.zero_point));
  // One step beyond the range is enough to know that a value is outside.
  const Floats below = low - 1.0f, above = high + 1.0f;
  const Floats to_integer = splat(12582912.0f);  // as in round_small

  const auto step = [&](const float* x, const float* residual, const float* const(&numbers)[2],
                        float* y) {
    uint32_t bits = 0;
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t k = v * kLanes;
      const Floats z = normalized<kResidual>(x + k, kResidual ? residual + k : nullptr,
                                             numbers[0] + k, numbers[1] + k);
      Masks passes = (z > lower) & (z < upper);
      Floats result = between(z, lower, upper);
      if constexpr (kQuantized) {
        Floats rounded = between(result * inverse, below, above);
        rounded = (rounded + to_integer) - to_integer;
        passes &= (rounded >= low) & (rounded <= high);
        result = between(rounded, low, high) * scale;
      }
      store(y + k, result);
      bits |= bits_of(passes) << k;
    }
    return bits;
  };
  const auto save = [&](int64_t i, int64_t count, uint32_t bits) {
    if (args.mask == nullptr) return;
    args.mask[i / 8] = static_cast<uint8_t>(bits);
    if (count > 8) args.mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  };
  const float* parameters[2] = {args.factor, args.addend};
  for_each_step(args, parameters, begin, end,
                [&](int64_t i, int64_t count, const float* const(&numbers)[2]) {
                  const float* residual = kResidual ? args.residual + i : nullptr;
                  if (count == kStep) {
                    save(i, count, step(args.x + i, residual, numbers, args.y + i));
                    return;
                  }
                  const PartialStep part(args.x + i, count), other(residual, count);
                  PartialStep y(nullptr, 0);
                  const uint32_t bits = step(part.values, other.values, numbers, y.values);
                  y.store_to(args.y + i, count);
                  save(i, count, bits & ((1u << count) - 1));
                });
}

template <bool kResidual>
void range(const BatchNormArgs& args, int64_t begin, int64_t end) {
  const Floats lower = splat(args.lower), upper = splat(args.upper);
  Floats minimum = splat(kInfinity), maximum = splat(-kInfinity);
  Masks nan = {};
  const auto take = [&](Floats a) {
    minimum = a < minimum ? a : minimum;
    maximum = a > maximum ? a : maximum;
    nan |= a != a;
  };
  const float* parameters[2] = {args.factor, args.addend};
  for_each_step(
      args, parameters, begin, end, [&](int64_t i, int64_t count, const float* const(&numbers)[2]) {
        const float* residual = kResidual ? args.residual + i : nullptr;
        if (count == kStep) {
          for (int64_t k = 0; k < kStep; k += kLanes) {
            take(between(normalized<kResidual>(args.x + i + k, kResidual ? residual + k : nullptr,
                                               numbers[0] + k, numbers[1] + k),
                         lower, upper));
          }
          return;
        }
        const PartialStep part(args.x + i, count), other(residual, count);
        float results[kStep];
        for (int64_t k = 0; k < kStep; k += kLanes) {
          store(results + k, between(normalized<kResidual>(part.values + k, other.values + k,
                                                           numbers[0] + k, numbers[1] + k),
                                     lower, upper));
        }
        for (int64_t k = 0; k < count; ++k) take(splat(results[k]));
      });
  float low = *args.minimum, high = *args.maximum;
  for (int64_t k = 0; k < kLanes; ++k) {
    const float smallest = minimum[k] + 0.0f, largest = maximum[k] + 0.0f;
    const bool was_nan = low != low || nan[k] != 0;
    low = was_nan ? kNaN : smallest < low ? smallest : low;
    high = was_nan ? kNaN : largest > high ? largest : high;
  }
  *args.minimum = low;
  *args.maximum = high;
}

}  // namespace

void batch_norm_statistics(const BatchNormStatisticsArgs& args, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    if (args.inner == 1) {
      for (int64_t r = part * args.channels; r < (part + 1) * args.channels; ++r) {
        args.sum[r] = args.squares[r] = 0.0;
        args.minimum[r] = kInfinity;
        args.maximum[r] = -kInfinity;
      }
      take_row_part(args, part);
      for (int64_t r = part * args.channels; r < (part + 1) * args.channels; ++r) {
        args.minimum[r] += 0.0f;  // -0 becomes +0
        args.maximum[r] += 0.0f;
      }
      continue;
    }
    double sum[kStep] = {}, squares[kStep] = {};
    float minimum[kStep], maximum[kStep];
    for (int64_t k = 0; k < kStep; ++k) {
      minimum[k] = kInfinity;
      maximum[k] = -kInfinity;
    }
    const Statistics lanes = {sum, squares, minimum, maximum};
    const float* x = args.x + part * args.inner;
    const int64_t steps = args.inner / kStep;
    take_rows<kVectors>(x, kStep, steps, lanes);
    for (int64_t i = steps * kStep; i < args.inner; ++i) lanes.take(i - steps * kStep, x[i]);
    args.sum[part] = sum_of(sum);
    args.squares[part] = sum_of(squares);
    float low = kInfinity, high = -kInfinity;
    for (int64_t k = 0; k < kStep; ++k) {
      low = minimum[k] < low ? minimum[k] : low;
      high = maximum[k] > high ? maximum[k] : high;
    }
    args.minimum[part] = low + 0.0f;
    args.maximum[part] = high + 0.0f;
  }
}

void batch_norm_act(const BatchNormArgs& args, int64_t begin, int64_t end) {
  if (args.residual != nullptr) {
    args.quantized ? act<true, true>(args, begin, end) : act<true, false>(args, begin, end);
  } else {
    args.quantized ? act<false, true>(args, begin, end) : act<false, false>(args, begin, end);
  }
}

void batch_norm_range(const BatchNormArgs& args, int64_t begin, int64_t end) {
  args.residual != nullptr ? range<true>(args, begin, end) : range<false>(args, begin, end);
}
