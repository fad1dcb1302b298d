// Statistics in plain C++ with vector types, compiled once for every baseline: the including file
// opens the path's namespace and defines QT_VECTOR_BYTES. No include guard and no includes, on
// purpose.

namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;

constexpr float kNaN = __builtin_nanf("");

// Minimum and maximum of values, and whether there was a NaN. -0 counts as +0.
struct Extremes {
  float minimum = __builtin_inff(), maximum = -__builtin_inff();
  bool nan = false;

  void take(float x) {
    minimum = x < minimum ? x : minimum;
    maximum = x > maximum ? x : maximum;
    nan |= x != x;
  }
  void merge_into(float& low, float& high) const {
    const bool was_nan = low != low;
    const float smallest = minimum + 0.0f, largest = maximum + 0.0f;
    low = nan || was_nan ? kNaN : (smallest < low ? smallest : low);
    high = nan || was_nan ? kNaN : (largest > high ? largest : high);
  }
};

Extremes extremes_of(const float* x, int64_t count) {
  constexpr int64_t kUnroll = 4;  // hides the latency of min and max
  Extremes result;
  int64_t i = 0;
  if (count >= kLanes * kUnroll) {
    Floats low[kUnroll], high[kUnroll];
    Masks nan[kUnroll] = {};
    __builtin_memcpy(low, x, sizeof low);
    __builtin_memcpy(high, x, sizeof high);
    for (; i + kLanes * kUnroll <= count; i += kLanes * kUnroll) {
      for (int64_t u = 0; u < kUnroll; ++u) {
        Floats value;
        __builtin_memcpy(&value, x + i + u * kLanes, sizeof value);
        low[u] = value < low[u] ? value : low[u];
        high[u] = value > high[u] ? value : high[u];
        nan[u] |= value != value;
      }
    }
    for (int64_t u = 0; u < kUnroll; ++u) {
      for (int64_t k = 0; k < kLanes; ++k) {
        result.take(low[u][k]);
        result.take(high[u][k]);
        result.nan |= nan[u][k] != 0;
      }
    }
  }
  for (; i < count; ++i) result.take(x[i]);
  return result;
}

// Element k belongs to channel k.
void take_across(const float* x, float* minimum, float* maximum, int64_t count) {
  QT_INDEPENDENT_ITERATIONS
  for (int64_t k = 0; k < count; ++k) {
    const float value = x[k] + 0.0f;
    const float low = minimum[k], high = maximum[k];
    const float smallest = value < low ? value : low;
    const float largest = value > high ? value : high;
    minimum[k] = value == value ? smallest : kNaN;
    maximum[k] = value == value ? largest : kNaN;
  }
}

constexpr int64_t kBlock = 256;  // elements whose bins are found before they are counted

// Bins of x[0, count), `bins` for what is not counted.
void find_bins(const float* x, int64_t count, float lower, float upper, float factor, int64_t bins,
               int32_t* found) {
  const float last = static_cast<float>(bins - 1);
  const float none = static_cast<float>(bins);
  for (int64_t k = 0; k < count; ++k) {
    float position = (x[k] - lower) * factor;
    position = position > last ? last : position;
    position = x[k] >= lower ? position : none;
    position = x[k] <= upper ? position : none;
    found[k] = static_cast<int32_t>(position);
  }
}

}  // namespace

void min_max(const MinMaxArgs& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (args.outer * args.channels == 1) {
    const Extremes extremes = extremes_of(args.x + begin, end - begin);
    extremes.merge_into(args.minimum[0], args.maximum[0]);
  } else if (args.inner == 1) {
    while (begin < end) {
      const int64_t c = begin % args.channels;
      const int64_t rest = args.channels - c;
      const int64_t count = rest < end - begin ? rest : end - begin;
      take_across(args.x + begin, args.minimum + c, args.maximum + c, count);
      begin += count;
    }
  } else {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t c = row % args.channels;
      const Extremes extremes = extremes_of(args.x + row * args.inner, args.inner);
      extremes.merge_into(args.minimum[c], args.maximum[c]);
    }
  }
}

void histogram(const HistogramArgs& args, int64_t begin, int64_t end) {
  const double width = static_cast<double>(args.upper) - static_cast<double>(args.lower);
  const double bins_per_unit = static_cast<double>(args.bins) / width;
  const float factor = bins_per_unit < static_cast<double>(__FLT_MAX__)
                           ? static_cast<float>(bins_per_unit)
                           : __FLT_MAX__;
  // Neighbouring elements often share a bin: four tables keep an increment from waiting for the
  // one before it.
  constexpr int64_t kTables = 4, kTableBins = 4096;
  int32_t found[kBlock];
  if (args.bins > kTableBins) {
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t count = end - i < kBlock ? end - i : kBlock;
      find_bins(args.x + i, count, args.lower, args.upper, factor, args.bins, found);
      for (int64_t k = 0; k < count; ++k) {
        if (found[k] < args.bins) args.counts[found[k]] += 1;
      }
    }
    return;
  }
  constexpr int64_t kMostElements = int64_t{1} << 31;  // so that 32-bit counts suffice
  uint32_t tables[kTables][kTableBins + 1];
  while (begin < end) {
    const int64_t part_end = end - begin < kMostElements ? end : begin + kMostElements;
    for (auto& table : tables) {
      for (int64_t bin = 0; bin <= args.bins; ++bin) table[bin] = 0;
    }
    for (; begin < part_end; begin += kBlock) {
      const int64_t count = part_end - begin < kBlock ? part_end - begin : kBlock;
      find_bins(args.x + begin, count, args.lower, args.upper, factor, args.bins, found);
      int64_t k = 0;
      for (; k + kTables <= count; k += kTables) {
        for (int64_t t = 0; t < kTables; ++t) tables[t][found[k + t]] += 1;
      }
      for (; k < count; ++k) tables[0][found[k]] += 1;
    }
    begin = part_end;
    for (const auto& table : tables) {
      for (int64_t bin = 0; bin < args.bins; ++bin) args.counts[bin] += table[bin];
    }
  }
}
