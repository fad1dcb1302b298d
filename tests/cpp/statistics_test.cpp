#include "kernels/statistics.h"

#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t outer, channels, inner;
  int64_t size() const { return outer * channels * inner; }
  int64_t rows() const { return outer * channels == 1 ? inner : outer * channels; }
};

const Shape kShapes[] = {
    {1, 1, 0},    {1, 1, 1},  {1, 1, 15},   {1, 1, 17}, {1, 1, 63},  {1, 1, 64},  {1, 1, 65},
    {1, 1, 1000}, {2, 3, 1},  {5, 17, 1},   {9, 64, 1}, {2, 65, 1},  {4, 3, 9},   {2, 5, 300},
    {7, 1, 33},   {1, 4, 64}, {1000, 1, 1}, {1, 3, 0},  {40, 64, 1}, {9, 200, 1}, {3, 5000, 1}};

struct Extremes {
  explicit Extremes(const Shape& shape)
      : minimum(shape.channels, 3), maximum(shape.channels, 3), channels(shape.channels) {
    std::fill_n(minimum.data(), channels, kInfinity);
    std::fill_n(maximum.data(), channels, -kInfinity);
  }
  void take(Path path, const Shape& shape, const std::vector<float>& x, int64_t begin,
            int64_t end) {
    MinMaxArgs args;
    args.x = x.data();
    args.outer = shape.outer;
    args.channels = shape.channels;
    args.inner = shape.inner;
    args.minimum = minimum.data();
    args.maximum = maximum.data();
    run_on(path, Kernel::min_max, [&] { min_max(args, begin, end); });
  }
  Guarded<float> minimum, maximum;
  int64_t channels;
};

std::string text(const Shape& shape) {
  return "shape " + std::to_string(shape.outer) + "x" + std::to_string(shape.channels) + "x" +
         std::to_string(shape.inner);
}

// The kinds of data: ordinary, with zeros of both signs only, with infinities, with some NaN.
std::vector<float> data_of(const Shape& shape, int kind, uint64_t seed) {
  Random random(seed);
  std::vector<float> x = random.reals(shape.size(), -5.0f, 3.0f);
  for (float& value : x) {
    if (kind == 1) value = random.integer(0, 1) == 0 ? 0.0f : -0.0f;
    const int64_t choice = random.integer(0, 59);
    if (kind == 2 && choice < 3)
      value = choice == 0 ? kInfinity : choice == 1 ? -kInfinity : 1e-42f;
    if (kind == 3 && choice == 0) value = random.integer(0, 1) == 0 ? kNaN : -kNaN;
  }
  return x;
}

QT_FOR_EACH_PATH(MinMax, min_max);
QT_FOR_EACH_PATH(Histogram, histogram);

TEST_P(MinMax, GivesTheReferencesBits) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    for (int kind = 0; kind < 4; ++kind) {
      const std::vector<float> x = data_of(shape, kind, seed++);
      const int64_t rows = shape.rows();
      const int64_t cuts[][2] = {{0, rows}, {rows / 3, rows - rows / 5}, {rows / 2, rows / 2}};
      for (const auto& [begin, end] : cuts) {
        Extremes expected(shape), actual(shape);
        expected.take(Path::reference, shape, x, begin, end);
        actual.take(GetParam(), shape, x, begin, end);
        EXPECT_EQ(actual.minimum.bytes(), expected.minimum.bytes()) << text(shape) << " " << kind;
        EXPECT_EQ(actual.maximum.bytes(), expected.maximum.bytes()) << text(shape) << " " << kind;
      }
    }
  }
}

TEST_P(MinMax, PartsMergeToTheWhole) {
  uint64_t seed = 500;
  for (const Shape& shape : kShapes) {
    for (int kind = 0; kind < 4; ++kind) {
      const std::vector<float> x = data_of(shape, kind, seed++);
      Extremes whole(shape), parts(shape);
      whole.take(GetParam(), shape, x, 0, shape.rows());
      parts.take(GetParam(), shape, x, 0, shape.rows() / 4);
      parts.take(GetParam(), shape, x, shape.rows() / 4, shape.rows());
      EXPECT_EQ(parts.minimum.bytes(), whole.minimum.bytes()) << text(shape) << " " << kind;
      EXPECT_EQ(parts.maximum.bytes(), whole.maximum.bytes()) << text(shape) << " " << kind;
    }
  }
}

TEST_P(MinMax, FindsTheOnlyExtremeWhereverItIs) {
  const Shape shape = {1, 1, 300};
  for (int64_t at = 0; at < 300; ++at) {
    std::vector<float> x(300, 0.5f);
    x[at] = -7.0f;
    x[(at + 150) % 300] = 9.0f;
    Extremes extremes(shape);
    extremes.take(GetParam(), shape, x, 0, 300);
    EXPECT_EQ(extremes.minimum.data()[0], -7.0f) << at;
    EXPECT_EQ(extremes.maximum.data()[0], 9.0f) << at;
    x[at] = kNaN;
    extremes.take(GetParam(), shape, x, 0, 300);
    EXPECT_TRUE(std::isnan(extremes.minimum.data()[0])) << at;
    EXPECT_TRUE(std::isnan(extremes.maximum.data()[0])) << at;
  }
}

TEST(MinMaxReference, FollowsItsDefinition) {
  uint64_t seed = 900;
  for (const Shape& shape : kShapes) {
    for (int kind = 0; kind < 4; ++kind) {
      const std::vector<float> x = data_of(shape, kind, seed++);
      Extremes extremes(shape);
      extremes.take(Path::reference, shape, x, 0, shape.rows());
      for (int64_t c = 0; c < shape.channels; ++c) {
        double minimum = INFINITY, maximum = -INFINITY;
        bool nan = false;
        for (int64_t o = 0; o < shape.outer; ++o) {
          for (int64_t i = 0; i < shape.inner; ++i) {
            const double value = x[(o * shape.channels + c) * shape.inner + i];
            nan |= std::isnan(value);
            minimum = std::fmin(minimum, value);
            maximum = std::fmax(maximum, value);
          }
        }
        const float low = extremes.minimum.data()[c], high = extremes.maximum.data()[c];
        if (nan) {
          EXPECT_TRUE(std::isnan(low) && std::isnan(high)) << text(shape) << " " << c;
        } else {
          EXPECT_EQ(low, minimum) << text(shape) << " " << c;
          EXPECT_EQ(high, maximum) << text(shape) << " " << c;
        }
      }
    }
  }
}

struct Bins {
  int64_t bins;
  float lower, upper;
};
const Bins kBins[] = {{1, -1.0f, 1.0f},      {7, -5.0f, 3.0f},         {2048, -2.0f, 2.5f},
                      {4096, 0.0f, 3.0f},    {5000, -5.0f, 3.0f},      {256, 0.1f, 0.10001f},
                      {64, 0.0f, 1e-44f},    {100, -FLT_MAX, FLT_MAX}, {2048, 1.0f, 1.0000001f},
                      {16, -1e30f, 2.0e30f}, {3, -0.0f, 1e-38f}};

std::vector<float> histogram_data(const Bins& bins, int64_t size, uint64_t seed) {
  Random random(seed);
  const float specials[] = {kNaN, kInfinity, -kInfinity, FLT_MAX,    -FLT_MAX,
                            0.0f, -0.0f,     bins.lower, bins.upper, FLT_TRUE_MIN};
  std::vector<float> x = random.reals(size, 0.0f, 1.0f);
  for (float& value : x) {
    const float middle = bins.lower / 2 + bins.upper / 2;
    const float half = bins.upper / 2 - bins.lower / 2;
    value = middle + (value * 2 - 1) * half * (random.integer(0, 3) == 0 ? 1.5f : 1.0f);
    if (random.integer(0, 9) == 0) value = specials[random.integer(0, 9)];
    if (random.integer(0, 9) == 0) value = std::nextafter(bins.upper, bins.lower);
  }
  return x;
}

std::vector<uint8_t> histogram_on(Path path, const Bins& bins, const std::vector<float>& x,
                                  int64_t begin, int64_t end) {
  Guarded<int64_t> counts(bins.bins);
  std::fill_n(counts.data(), bins.bins, 5);
  HistogramArgs args;
  args.x = x.data();
  args.lower = bins.lower;
  args.upper = bins.upper;
  args.bins = bins.bins;
  args.counts = counts.data();
  run_on(path, Kernel::histogram, [&] { histogram(args, begin, end); });
  // With the extremes the counts are the same.
  Guarded<float> extremes(2);
  extremes.data()[0] = kInfinity;
  extremes.data()[1] = -kInfinity;
  Guarded<int64_t> again(bins.bins);
  std::fill_n(again.data(), bins.bins, 5);
  args.counts = again.data();
  args.minimum = extremes.data();
  args.maximum = extremes.data() + 1;
  run_on(path, Kernel::histogram, [&] { histogram(args, begin, end); });
  EXPECT_EQ(again.bytes(), counts.bytes());
  std::vector<uint8_t> result = counts.bytes();
  result.insert(result.end(), extremes.bytes().begin(), extremes.bytes().end());
  return result;
}

TEST_P(Histogram, GivesTheReferencesCounts) {
  uint64_t seed = 1;
  for (const Bins& bins : kBins) {
    for (int64_t size : {0, 1, 15, 17, 64, 65, 255, 256, 257, 3000}) {
      const std::vector<float> x = histogram_data(bins, size, seed++);
      const int64_t cuts[][2] = {{0, size}, {size / 3, size - size / 5}, {size / 2, size / 2}};
      for (const auto& [begin, end] : cuts) {
        EXPECT_EQ(histogram_on(GetParam(), bins, x, begin, end),
                  histogram_on(Path::reference, bins, x, begin, end))
            << bins.bins << " bins, " << bins.lower << " to " << bins.upper << ", " << size;
      }
    }
  }
}

TEST_P(Histogram, HandComputedCounts) {
  const std::vector<float> x = {-1.0f, -0.01f, 0.0f, 0.24f, 0.25f, 0.5f, 0.99f, 1.0f, 1.01f, kNaN};
  std::vector<int64_t> counts(4, 0);
  HistogramArgs args;
  args.x = x.data();
  args.lower = 0.0f;
  args.upper = 1.0f;
  args.bins = 4;
  args.counts = counts.data();
  run_on(GetParam(), Kernel::histogram,
         [&] { histogram(args, 0, static_cast<int64_t>(x.size())); });
  EXPECT_EQ(counts, (std::vector<int64_t>{2, 1, 1, 2}));
}

TEST(HistogramReference, CountsEveryValueInsideNearItsExactBin) {
  for (const Bins& bins : {kBins[0], kBins[1], kBins[2], kBins[3], kBins[4]}) {
    const std::vector<float> x = histogram_data(bins, 3000, 42);
    for (int64_t i = 0; i < 3000; ++i) {
      std::vector<int64_t> counts(bins.bins, 0);
      HistogramArgs args;
      args.x = x.data();
      args.lower = bins.lower;
      args.upper = bins.upper;
      args.bins = bins.bins;
      args.counts = counts.data();
      run_on(Path::reference, Kernel::histogram, [&] { histogram(args, i, i + 1); });
      if (!(x[i] >= bins.lower && x[i] <= bins.upper)) {
        EXPECT_EQ(std::count(counts.begin(), counts.end(), 0), bins.bins) << x[i];
        continue;
      }
      // In float32 the position may be off by a few units in its last place.
      const double exact = (static_cast<double>(x[i]) - bins.lower) *
                           (static_cast<double>(bins.bins) / (double{bins.upper} - bins.lower));
      const int64_t bin = std::find(counts.begin(), counts.end(), 1) - counts.begin();
      ASSERT_LT(bin, bins.bins) << x[i];
      EXPECT_GE(exact, static_cast<double>(bin) - 0.01) << x[i];
      EXPECT_LE(exact, static_cast<double>(bin) + 1.01) << x[i];
    }
  }
}

}  // namespace
}  // namespace qtoolkit::kernels
