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

// The extremes of many values, in vectors.
class ManyExtremes {
 public:
  ManyExtremes() {
    for (int64_t u = 0; u < kUnroll; ++u) {
      low_[u] = Floats{} + __builtin_inff();
      high_[u] = Floats{} - __builtin_inff();
      nan_[u] = Masks{};
    }
  }

  void take(const float* x, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes * kUnroll <= count; i += kLanes * kUnroll) {
      for (int64_t u = 0; u < kUnroll; ++u) take_vector(x + i + u * kLanes, u);
    }
    for (; i + kLanes <= count; i += kLanes) take_vector(x + i, 0);
    for (; i < count; ++i) rest_.take(x[i]);
  }

  Extremes result() const {
    Floats low = low_[0], high = high_[0];
    Masks nan = nan_[0];
    for (int64_t u = 1; u < kUnroll; ++u) {
      low = low_[u] < low ? low_[u] : low;
      high = high_[u] > high ? high_[u] : high;
      nan |= nan_[u];
    }
    Extremes result = rest_;
    for (int64_t k = 0; k < kLanes; ++k) {
      result.minimum = low[k] < result.minimum ? low[k] : result.minimum;
      result.maximum = high[k] > result.maximum ? high[k] : result.maximum;
      result.nan |= nan[k] != 0;
    }
    return result;
  }

 private:
  static constexpr int64_t kUnroll = 4;  // hides the latency of min and max

  void take_vector(const float* x, int64_t u) {
    Floats value;
    __builtin_memcpy(&value, x, sizeof value);
    low_[u] = value < low_[u] ? value : low_[u];
    high_[u] = value > high_[u] ? value : high_[u];
    nan_[u] |= value != value;
  }

  Floats low_[kUnroll], high_[kUnroll];
  Masks nan_[kUnroll];
  Extremes rest_;
};

Extremes extremes_of(const float* x, int64_t count) {
  ManyExtremes extremes;
  extremes.take(x, count);
  return extremes.result();
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

constexpr int64_t kTileVectors = 4;
constexpr int64_t kTile = kTileVectors * kLanes;  // columns whose extremes fit into registers

// `rows` rows of kTile columns, `stride` elements apart.
void take_tile(const float* x, int64_t rows, int64_t stride, float* minimum, float* maximum) {
  Floats low[kTileVectors], high[kTileVectors];
  Masks nan[kTileVectors] = {};
  __builtin_memcpy(low, minimum, sizeof low);
  __builtin_memcpy(high, maximum, sizeof high);
  for (int64_t v = 0; v < kTileVectors; ++v) nan[v] = low[v] != low[v];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t v = 0; v < kTileVectors; ++v) {
      Floats value;
      __builtin_memcpy(&value, x + row * stride + v * kLanes, sizeof value);
      low[v] = value < low[v] ? value : low[v];
      high[v] = value > high[v] ? value : high[v];
      nan[v] |= value != value;
    }
  }
  for (int64_t v = 0; v < kTileVectors; ++v) {
    low[v] = nan[v] ? Floats{} + kNaN : low[v] + 0.0f;  // -0 becomes +0
    high[v] = nan[v] ? Floats{} + kNaN : high[v] + 0.0f;
  }
  __builtin_memcpy(minimum, low, sizeof low);
  __builtin_memcpy(maximum, high, sizeof high);
}

// Rows of `columns` side by side, some rows at a time, so that they are still in the cache for the
// next columns.
void take_rows(const float* x, int64_t rows, int64_t columns, float* minimum, float* maximum) {
  constexpr int64_t kCached = 4096, kLeastRows = 4;
  const int64_t most = columns * kLeastRows < kCached ? kCached / columns : kLeastRows;
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t count = rows - row < most ? rows - row : most;
    const float* from = x + row * columns;
    int64_t c = 0;
    for (; c + kTile <= columns; c += kTile) {
      take_tile(from + c, count, columns, minimum + c, maximum + c);
    }
    if (c == columns) continue;
    for (int64_t r = 0; r < count; ++r) {
      take_across(from + r * columns + c, minimum + c, maximum + c, columns - c);
    }
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
      const int64_t rows = c == 0 ? (end - begin) / args.channels : 0;
      if (rows > 0) {
        take_rows(args.x + begin, rows, args.channels, args.minimum, args.maximum);
        begin += rows * args.channels;
        continue;
      }
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
  ManyExtremes extremes;
  int32_t found[kBlock];
  // The next kBlock elements at most; returns how many.
  const auto find_next = [&](int64_t limit) {
    const int64_t count = limit - begin < kBlock ? limit - begin : kBlock;
    find_bins(args.x + begin, count, args.lower, args.upper, factor, args.bins, found);
    if (args.minimum != nullptr) extremes.take(args.x + begin, count);
    begin += count;
    return count;
  };
  // Neighbouring elements often share a bin: four tables keep an increment from waiting for the
  // one before it. They are worth their cost for many elements only.
  constexpr int64_t kTables = 4, kTableBins = 4096, kLeastPerBin = 2;
  if (args.bins > kTableBins || end - begin < kLeastPerBin * args.bins) {
    while (begin < end) {
      const int64_t count = find_next(end);
      for (int64_t k = 0; k < count; ++k) {
        if (found[k] < args.bins) args.counts[found[k]] += 1;
      }
    }
  }
  constexpr int64_t kMostElements = int64_t{1} << 31;  // so that 32-bit counts suffice
  uint32_t tables[kTables][kTableBins + 1];
  while (begin < end) {
    const int64_t part_end = end - begin < kMostElements ? end : begin + kMostElements;
    for (auto& table : tables) {
      for (int64_t bin = 0; bin <= args.bins; ++bin) table[bin] = 0;
    }
    while (begin < part_end) {
      const int64_t count = find_next(part_end);
      int64_t k = 0;
      for (; k + kTables <= count; k += kTables) {
        for (int64_t t = 0; t < kTables; ++t) tables[t][found[k + t]] += 1;
      }
      for (; k < count; ++k) tables[0][found[k]] += 1;
    }
    for (const auto& table : tables) {
      for (int64_t bin = 0; bin < args.bins; ++bin) args.counts[bin] += table[bin];
    }
  }
  if (args.minimum != nullptr) extremes.result().merge_into(args.minimum[0], args.maximum[0]);
}
