#include "kernels/batch_norm.h"

#include <gtest/gtest.h>

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
  int64_t part_rows() const { return 5; }
  int64_t parts() const { return inner > 1 ? outer * channels : (outer + 4) / 5; }
  int64_t results() const { return parts() * (inner > 1 ? 1 : channels); }
};

// Rows of channels: whole groups of registers, odd ones, fewer than a vector. Planes: shorter than
// a step, with and without a rest, and ends that are no whole byte of the mask.
const Shape kShapes[] = {{7, 64, 1}, {23, 128, 1}, {9, 17, 1}, {40, 3, 1},  {11, 80, 1},
                         {6, 4, 1},  {5, 1, 1},    {3, 77, 1}, {1, 16, 1},  {4100, 2, 1},
                         {2, 3, 49}, {1, 2, 16},   {3, 5, 7},  {2, 2, 200}, {1, 1, 1000},
                         {4, 3, 2},  {2, 1, 33}};

std::string text(const Shape& shape) {
  return "shape " + std::to_string(shape.outer) + "x" + std::to_string(shape.channels) + "x" +
         std::to_string(shape.inner);
}

// `kind` 1 has special values too.
std::vector<float> data_of(int64_t size, int kind, uint64_t seed) {
  Random random(seed);
  std::vector<float> x = random.reals(size, -5.0f, 3.0f);
  const float specials[] = {kInfinity, -kInfinity, kNaN, 0.0f, -0.0f, 1e-42f, 3e38f, -3e38f};
  for (float& value : x) {
    if (kind == 1 && random.integer(0, 19) == 0) value = specials[random.integer(0, 7)];
  }
  return x;
}

std::vector<float> spread(const Shape& shape, const std::vector<float>& values, int64_t& period) {
  period = (15 + shape.channels) / shape.channels * shape.channels;
  if (shape.inner > 1) return values;
  std::vector<float> result(static_cast<size_t>(period + kBatchNormStep));
  for (size_t i = 0; i < result.size(); ++i) result[i] = values[i % values.size()];
  return result;
}

// The bits, any NaN being one; guards included.
template <class T>
std::vector<uint8_t> bits_of(Guarded<T>& guarded, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    T& value = guarded.data()[i];
    if (std::isnan(static_cast<double>(value))) {
      value = static_cast<T>(std::numeric_limits<double>::quiet_NaN());
    }
  }
  return guarded.bytes();
}

using Bytes = std::vector<std::vector<uint8_t>>;

Bytes statistics_on(Path path, const Shape& shape, const std::vector<float>& x, int64_t begin,
                    int64_t end) {
  Guarded<double> sum(shape.results()), squares(shape.results());
  Guarded<float> minimum(shape.results()), maximum(shape.results());
  BatchNormStatisticsArgs args;
  args.x = x.data();
  args.outer = shape.outer;
  args.channels = shape.channels;
  args.inner = shape.inner;
  args.part_rows = shape.part_rows();
  args.sum = sum.data();
  args.squares = squares.data();
  args.minimum = minimum.data();
  args.maximum = maximum.data();
  run_on(path, Kernel::batch_norm_statistics, [&] { batch_norm_statistics(args, begin, end); });
  return {bits_of(sum, shape.results()), bits_of(squares, shape.results()),
          bits_of(minimum, shape.results()), bits_of(maximum, shape.results())};
}

QT_FOR_EACH_PATH(BatchNorm, batch_norm_statistics);

TEST_P(BatchNorm, StatisticsAreTheReferencesBits) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    for (int kind = 0; kind < 2; ++kind) {
      const std::vector<float> x = data_of(shape.size(), kind, seed++);
      for (const int64_t begin : {int64_t{0}, shape.parts() / 2}) {
        EXPECT_EQ(statistics_on(GetParam(), shape, x, begin, shape.parts()),
                  statistics_on(Path::reference, shape, x, begin, shape.parts()))
            << text(shape) << " kind " << kind;
      }
    }
  }
}

struct ElementCase {
  bool residual, quantized, masked;
  float lower, upper;
};
const ElementCase kCases[] = {{false, true, true, 0.0f, kInfinity},
                              {true, true, true, 0.0f, 1.5f},
                              {false, true, true, -kInfinity, kInfinity},
                              {true, false, true, 0.0f, kInfinity},
                              {false, false, false, -kInfinity, kInfinity}};

struct ElementData {
  ElementData(const Shape& shape, const ElementCase& element_case, int kind, uint64_t seed)
      : x(data_of(shape.size(), kind, seed)), residual(data_of(shape.size(), kind, seed + 1000)) {
    const auto values = data_of(2 * shape.channels, 0, seed + 2000);
    factor = spread(shape, {values.begin(), values.begin() + shape.channels}, args.period);
    addend = spread(shape, {values.begin() + shape.channels, values.end()}, args.period);
    args.outer = shape.outer;
    args.channels = shape.channels;
    args.inner = shape.inner;
    args.factor = factor.data();
    args.addend = addend.data();
    args.x = x.data();
    args.residual = element_case.residual ? residual.data() : nullptr;
    args.lower = element_case.lower;
    args.upper = element_case.upper;
    args.quantized = element_case.quantized;
    args.scale = 0.031f;
    args.zero_point = element_case.lower == 0.0f ? 0 : 131;
  }
  std::vector<float> x, residual, factor, addend;
  BatchNormArgs args;
};

Bytes act_on(Path path, const Shape& shape, const ElementData& data, bool masked, int64_t begin) {
  Guarded<float> y(shape.size(), 1);
  Guarded<uint8_t> mask((shape.size() + 7) / 8);
  BatchNormArgs args = data.args;
  args.y = y.data();
  args.mask = masked ? mask.data() : nullptr;
  run_on(path, Kernel::batch_norm_act, [&] { batch_norm_act(args, begin, shape.size()); });
  return {bits_of(y, shape.size()), mask.bytes()};
}

std::vector<uint8_t> range_on(Path path, const Shape& shape, const ElementData& data,
                              int64_t begin) {
  Guarded<float> range(2);
  range.data()[0] = kInfinity;
  range.data()[1] = -kInfinity;
  BatchNormArgs args = data.args;
  args.minimum = range.data();
  args.maximum = range.data() + 1;
  run_on(path, Kernel::batch_norm_range, [&] { batch_norm_range(args, begin, shape.size()); });
  return bits_of(range, 2);
}

TEST_P(BatchNorm, ElementsMasksAndRangesAreTheReferencesBits) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    for (const ElementCase& element_case : kCases) {
      for (int kind = 0; kind < 2; ++kind) {
        const ElementData data(shape, element_case, kind, seed++);
        for (const int64_t begin : {int64_t{0}, shape.size() / 2 / 16 * 16}) {
          EXPECT_EQ(act_on(GetParam(), shape, data, element_case.masked, begin),
                    act_on(Path::reference, shape, data, element_case.masked, begin))
              << text(shape) << " kind " << kind << " from " << begin;
          EXPECT_EQ(range_on(GetParam(), shape, data, begin),
                    range_on(Path::reference, shape, data, begin))
              << text(shape) << " kind " << kind << " from " << begin;
        }
      }
    }
  }
}

struct GradientData {
  GradientData(const Shape& shape, int kind, uint64_t seed)
      : grad(data_of(shape.size(), kind, seed)), x(data_of(shape.size(), 0, seed + 1000)) {
    Random random(seed);
    mask = random.codes((shape.size() + 7) / 8);
    for (int p = 0; p < 4; ++p) {
      numbers.push_back(spread(shape, data_of(shape.channels, 0, seed + 2000 + p), period));
    }
  }
  std::vector<float> grad, x;
  std::vector<uint8_t> mask;
  std::vector<std::vector<float>> numbers;
  int64_t period = 0;
};

Bytes reduce_on(Path path, const Shape& shape, const GradientData& data, bool masked, bool stored,
                bool in_place) {
  Guarded<double> sum(shape.results()), products(shape.results());
  Guarded<float> dz(shape.size(), 1);
  std::copy(data.grad.begin(), data.grad.end(), dz.data());
  BatchNormReduceArgs args;
  args.outer = shape.outer;
  args.channels = shape.channels;
  args.inner = shape.inner;
  args.part_rows = shape.part_rows();
  args.grad = in_place ? dz.data() : data.grad.data();
  args.x = data.x.data();
  args.mask = masked ? data.mask.data() : nullptr;
  args.dz = stored ? dz.data() : nullptr;
  args.sum = sum.data();
  args.products = products.data();
  run_on(path, Kernel::batch_norm_reduce, [&] { batch_norm_reduce(args, 0, shape.parts()); });
  return {bits_of(sum, shape.results()), bits_of(products, shape.results()),
          bits_of(dz, shape.size())};
}

std::vector<uint8_t> gradient_on(Path path, const Shape& shape, const GradientData& data,
                                 bool masked, bool statistics, bool in_place, int64_t begin) {
  Guarded<float> grad_x(shape.size(), 1);
  std::copy(data.grad.begin(), data.grad.end(), grad_x.data());
  BatchNormGradientArgs args;
  args.outer = shape.outer;
  args.channels = shape.channels;
  args.inner = shape.inner;
  args.period = data.period;
  args.factor = data.numbers[0].data();
  args.mean = data.numbers[1].data();
  args.slope = data.numbers[2].data();
  args.addend = data.numbers[3].data();
  args.grad = in_place ? grad_x.data() : data.grad.data();
  args.x = statistics ? data.x.data() : nullptr;
  args.mask = masked ? data.mask.data() : nullptr;
  args.grad_x = grad_x.data();
  run_on(path, Kernel::batch_norm_gradient,
         [&] { batch_norm_gradient(args, begin, shape.size()); });
  return bits_of(grad_x, shape.size());
}

TEST_P(BatchNorm, GradientsAreTheReferencesBits) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    for (int kind = 0; kind < 2; ++kind) {
      const GradientData data(shape, kind, seed++);
      for (int flags = 0; flags < 8; ++flags) {
        const bool masked = flags & 1, second = flags & 2, in_place = flags & 4;
        EXPECT_EQ(reduce_on(GetParam(), shape, data, masked, second, in_place),
                  reduce_on(Path::reference, shape, data, masked, second, false))
            << text(shape) << " kind " << kind << " flags " << flags;
        for (const int64_t begin : {int64_t{0}, shape.size() / 2 / 16 * 16}) {
          EXPECT_EQ(gradient_on(GetParam(), shape, data, masked, second, in_place, begin),
                    gradient_on(Path::reference, shape, data, masked, second, false, begin))
              << text(shape) << " kind " << kind << " flags " << flags << " from " << begin;
        }
      }
    }
  }
}

TEST(BatchNormReference, HandComputedElements) {
  const std::vector<float> x = {1, -1, 2, 3, 0.5f, 100};
  const std::vector<float> two(20, 2.0f), minus_one(20, -1.0f);
  std::vector<float> y(6);
  uint8_t mask = 0xFF;
  BatchNormArgs args;
  args.outer = 6;
  args.period = 16;
  args.factor = two.data();
  args.addend = minus_one.data();
  args.x = x.data();
  args.lower = 0.0f;
  args.upper = 6.0f;
  args.quantized = true;
  args.scale = 0.5f;
  args.quant_max = 8;
  args.y = y.data();
  args.mask = &mask;
  run_on(Path::reference, Kernel::batch_norm_act, [&] { batch_norm_act(args, 0, 6); });
  EXPECT_EQ(y, (std::vector<float>{1, 0, 3, 4, 0, 4}));
  EXPECT_EQ(mask, 0b000101);  // 5 is beyond code 8, -3 and 0 are not above 0, 199 beyond 6
}

TEST(BatchNormReference, HandComputedSums) {
  const std::vector<float> x = {1, 10, -2, 20, 3, 30};
  const std::vector<float> grad = {1, 1, 1, 2, 1, 3};
  const uint8_t mask = 0b110111;
  double sum[4], squares[4], dz[4], products[4];
  float minimum[4], maximum[4];
  BatchNormStatisticsArgs statistics;
  statistics.x = x.data();
  statistics.outer = 3;
  statistics.channels = 2;
  statistics.part_rows = 2;
  statistics.sum = sum;
  statistics.squares = squares;
  statistics.minimum = minimum;
  statistics.maximum = maximum;
  run_on(Path::reference, Kernel::batch_norm_statistics,
         [&] { batch_norm_statistics(statistics, 0, 2); });
  EXPECT_EQ(std::vector<double>(sum, sum + 4), (std::vector<double>{-1, 30, 3, 30}));
  EXPECT_EQ(std::vector<double>(squares, squares + 4), (std::vector<double>{5, 500, 9, 900}));
  EXPECT_EQ(std::vector<float>(minimum, minimum + 4), (std::vector<float>{-2, 10, 3, 30}));
  EXPECT_EQ(std::vector<float>(maximum, maximum + 4), (std::vector<float>{1, 20, 3, 30}));
  BatchNormReduceArgs reduce;
  reduce.outer = 3;
  reduce.channels = 2;
  reduce.part_rows = 2;
  reduce.grad = grad.data();
  reduce.x = x.data();
  reduce.mask = &mask;
  reduce.sum = dz;
  reduce.products = products;
  run_on(Path::reference, Kernel::batch_norm_reduce, [&] { batch_norm_reduce(reduce, 0, 2); });
  EXPECT_EQ(std::vector<double>(dz, dz + 4), (std::vector<double>{2, 1, 1, 3}));
  EXPECT_EQ(std::vector<double>(products, products + 4), (std::vector<double>{-1, 10, 3, 90}));
}

}  // namespace
}  // namespace qtoolkit::kernels
