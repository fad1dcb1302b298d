#include "kernels/quantize.h"

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
};

// Sizes around every vector width, per tensor, per channel, and with the channels last.
const Shape kShapes[] = {{1, 1, 0},   {1, 1, 1},   {1, 1, 15},   {1, 1, 17},   {1, 1, 63},
                         {1, 1, 64},  {1, 1, 65},  {1, 1, 1000}, {2, 3, 1},    {5, 17, 1},
                         {3, 64, 1},  {2, 65, 1},  {2, 3, 9},    {1, 16, 147}, {3, 5, 64},
                         {300, 3, 1}, {50, 17, 1}, {8, 63, 1}};

struct Range {
  int32_t quant_min, quant_max;
};
const Range kRanges[] = {{0, 255}, {-128, 127}, {-127, 127}, {0, 15}, {-8, 7}};

// A quantization problem with every awkward value in it.
struct Problem {
  Problem(const Shape& shape, const Range& range, uint64_t seed) : shape(shape), range(range) {
    Random random(seed);
    for (int64_t c = 0; c < shape.channels; ++c) {
      // Powers of two, so that exact ties occur, and a scale so small that its inverse is infinite.
      const float choices[] = {0.25f, 0.0078125f, 1.0f, 0.0371f, 3.3f, 1e-40f};
      scale.push_back(choices[random.integer(0, shape.channels > 1 ? 5 : 4)]);
      zero_point.push_back(static_cast<int32_t>(random.integer(range.quant_min, range.quant_max)));
    }
    const float specials[] = {kNaN,     -kNaN,   kInfinity, -kInfinity,   FLT_MAX,
                              -FLT_MAX, FLT_MIN, -FLT_MIN,  FLT_TRUE_MIN, -FLT_TRUE_MIN,
                              0.0f,     -0.0f,   1e10f,     -1e10f,       2.1474836e9f};
    for (int64_t i = 0; i < shape.size(); ++i) {
      const float s = scale[i / shape.inner % shape.channels];
      switch (random.integer(0, 3)) {
        case 0:
          x.push_back(specials[random.integer(0, 14)]);
          break;
        case 1:
          x.push_back((static_cast<float>(random.integer(-300, 300)) + 0.5f) * s);
          break;
        default:
          x.push_back(random.real(-300.0f, 300.0f) * s);
      }
    }
    codes = random.codes(shape.size());
    args.channels = shape.channels;
    args.inner = shape.inner;
    args.scale = scale.data();
    args.zero_point = zero_point.data();
    args.quant_min = range.quant_min;
    args.quant_max = range.quant_max;
    args.x = x.data();
    args.codes = codes.data();
  }
  Problem(const Problem&) = delete;

  std::string text() const {
    return "shape " + std::to_string(shape.outer) + "x" + std::to_string(shape.channels) + "x" +
           std::to_string(shape.inner) + ", range " + std::to_string(range.quant_min) + " to " +
           std::to_string(range.quant_max);
  }

  Shape shape;
  Range range;
  std::vector<float> scale, x;
  std::vector<int32_t> zero_point;
  std::vector<uint8_t> codes;
  QuantizeArgs args;
};

using Function = void(const QuantizeArgs&, int64_t, int64_t);

// Bytes of the output of a call on [begin, end).
std::vector<uint8_t> output(Path path, Kernel kernel, Function* function, QuantizeArgs args,
                            int64_t size, int64_t begin, int64_t end) {
  if (kernel == Kernel::quantize) {
    Guarded<uint8_t> y(size, 1);
    args.y_codes = y.data();
    run_on(path, kernel, [&] { function(args, begin, end); });
    return y.bytes();
  }
  Guarded<float> y(size, 1);
  args.y = y.data();
  run_on(path, kernel, [&] { function(args, begin, end); });
  return y.bytes();
}

void expect_reference_bits(Path path, Kernel kernel, Function* function) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    for (const Range& range : kRanges) {
      const Problem problem(shape, range, seed++);
      const int64_t size = shape.size();
      const int64_t cuts[][2] = {{0, size}, {size / 3, size - size / 5}, {size / 2, size / 2}};
      for (const auto& [begin, end] : cuts) {
        EXPECT_EQ(output(path, kernel, function, problem.args, size, begin, end),
                  output(Path::reference, kernel, function, problem.args, size, begin, end))
            << problem.text() << ", elements " << begin << " to " << end;
      }
    }
  }
}

QT_FOR_EACH_PATH(Quantize, quantize);
QT_FOR_EACH_PATH(Dequantize, dequantize);

TEST_P(Quantize, GivesTheReferencesBits) {
  expect_reference_bits(GetParam(), Kernel::quantize, quantize);
}
TEST_P(Dequantize, GivesTheReferencesBits) {
  expect_reference_bits(GetParam(), Kernel::dequantize, dequantize);
}
// The rule in wide arithmetic: only the product is rounded to float32.
int64_t code_by_rule(const Problem& problem, int64_t i) {
  const int64_t c = i / problem.shape.inner % problem.shape.channels;
  const int64_t zero_point = problem.zero_point[c];
  const float product = problem.x[i] * (1.0f / problem.scale[c]);
  if (std::isnan(product)) return zero_point;
  const double code =
      std::nearbyint(static_cast<double>(product)) + static_cast<double>(zero_point);
  return static_cast<int64_t>(
      std::clamp<double>(code, problem.range.quant_min, problem.range.quant_max));
}

TEST(QuantizeReference, FollowsTheRule) {
  uint64_t seed = 1000;
  for (const Shape& shape : kShapes) {
    for (const Range& range : kRanges) {
      const Problem problem(shape, range, seed++);
      const int64_t size = shape.size();
      std::vector<uint8_t> codes(size);
      QuantizeArgs args = problem.args;
      args.y_codes = codes.data();
      run_on(Path::reference, Kernel::quantize, [&] { quantize(args, 0, size); });
      for (int64_t i = 0; i < size; ++i) {
        EXPECT_EQ(codes[i], static_cast<uint8_t>(code_by_rule(problem, i)))
            << problem.text() << " at " << i;
      }
    }
  }
}

TEST_P(Quantize, RoundsTiesToEvenAndSaturates) {
  const std::vector<float> x = {0.5f,  1.5f, 2.5f,      -0.5f,      -1.5f, 126.5f,
                                254.f, 1e9f, kInfinity, -kInfinity, kNaN,  -129.f};
  const float scale = 1.0f;
  const int32_t zero_point = 128;
  std::vector<uint8_t> y(x.size());
  QuantizeArgs args;
  args.inner = static_cast<int64_t>(x.size());
  args.scale = &scale;
  args.zero_point = &zero_point;
  args.x = x.data();
  args.y_codes = y.data();
  run_on(GetParam(), Kernel::quantize, [&] { quantize(args, 0, args.inner); });
  const std::vector<uint8_t> expected = {128, 130, 130, 128, 126, 254, 255, 255, 255, 0, 128, 0};
  EXPECT_EQ(y, expected);
}

TEST_P(Dequantize, ReadsSignedAndUnsignedCodes) {
  const std::vector<uint8_t> codes = {0, 1, 127, 128, 255};
  const float scale = 0.5f;
  const int32_t zero_point = 1;
  std::vector<float> y(codes.size());
  QuantizeArgs args;
  args.inner = static_cast<int64_t>(codes.size());
  args.scale = &scale;
  args.zero_point = &zero_point;
  args.codes = codes.data();
  args.y = y.data();
  run_on(GetParam(), Kernel::dequantize, [&] { dequantize(args, 0, args.inner); });
  EXPECT_EQ(y, (std::vector<float>{-0.5f, 0.0f, 63.0f, 63.5f, 127.0f}));
  args.quant_min = -128;
  args.quant_max = 127;
  run_on(GetParam(), Kernel::dequantize, [&] { dequantize(args, 0, args.inner); });
  EXPECT_EQ(y, (std::vector<float>{-0.5f, 0.0f, 63.0f, -64.5f, -1.0f}));
}

}  // namespace
}  // namespace qtoolkit::kernels
