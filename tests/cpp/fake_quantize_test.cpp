#include "kernels/fake_quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
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

// Memory of outer * channels * inner elements. Groups of `group` elements along rows of `inner`
// have parameters of their own; per channel, group is inner.
struct Shape {
  int64_t outer, channels, inner, group;

  int64_t size() const { return outer * channels * inner; }
  bool per_group() const { return group != inner; }
  int64_t groups() const { return (inner + group - 1) / group; }
  int64_t parameters() const { return per_group() ? outer * channels * groups() : channels; }
  int64_t parameter_of(int64_t i) const {
    const int64_t row = i / inner;
    return per_group() ? row * groups() + i % inner / group : row % channels;
  }
};

// Around every vector width and the 64 bits of a mask's word: per tensor, per channel, with the
// channels last, per group, with a short last group.
const Shape kShapes[] = {
    {1, 1, 1, 1},   {1, 1, 8, 8},     {1, 1, 15, 15},     {1, 1, 63, 63},    {1, 1, 64, 64},
    {1, 1, 65, 65}, {1, 1, 200, 200}, {1, 1, 1000, 1000}, {2, 3, 1, 1},      {5, 17, 1, 1},
    {3, 64, 1, 1},  {2, 65, 1, 1},    {2, 3, 9, 9},       {1, 16, 147, 147}, {3, 5, 64, 64},
    {300, 3, 1, 1}, {50, 17, 1, 1},   {8, 63, 1, 1},      {3, 200, 1, 1},    {4, 3, 70, 70},
    {1, 5, 64, 32}, {1, 7, 100, 32},  {2, 3, 40, 7},      {1, 2, 300, 128},  {1, 9, 3, 16}};

struct Range {
  int32_t quant_min, quant_max;
};
const Range kRanges[] = {{0, 255}, {-128, 127}, {-127, 127}, {0, 15}, {-2, 1}};

// A problem with every awkward value in it.
struct Problem {
  Problem(const Shape& shape, const Range& range, uint64_t seed) : shape(shape), range(range) {
    Random random(seed);
    for (int64_t c = 0; c < shape.parameters(); ++c) {
      // Powers of two, so that exact ties occur, and a scale so small that its inverse is infinite.
      const float choices[] = {0.25f, 0.0078125f, 1.0f, 0.0371f, 3.3f, 1e-40f};
      scale.push_back(choices[random.integer(0, shape.parameters() > 1 ? 5 : 4)]);
      zero_point.push_back(static_cast<int32_t>(random.integer(range.quant_min, range.quant_max)));
    }
    const float specials[] = {kNaN,     -kNaN,   kInfinity, -kInfinity,   FLT_MAX,
                              -FLT_MAX, FLT_MIN, -FLT_MIN,  FLT_TRUE_MIN, -FLT_TRUE_MIN,
                              0.0f,     -0.0f,   1e10f,     -1e10f,       2.1474836e9f};
    for (int64_t i = 0; i < shape.size(); ++i) {
      const float s = scale[shape.parameter_of(i)];
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
    args.channels = shape.parameters();
    args.inner = shape.inner;
    args.group = shape.group;
    args.scale = scale.data();
    args.zero_point = zero_point.data();
    args.quant_min = range.quant_min;
    args.quant_max = range.quant_max;
    args.x = x.data();
  }
  Problem(const Problem&) = delete;

  std::string text() const {
    return "shape " + std::to_string(shape.outer) + "x" + std::to_string(shape.channels) + "x" +
           std::to_string(shape.inner) + " in groups of " + std::to_string(shape.group) +
           ", range " + std::to_string(range.quant_min) + " to " + std::to_string(range.quant_max) +
           (args.relu ? ", relu" : "");
  }

  Shape shape;
  Range range;
  std::vector<float> scale, x;
  std::vector<int32_t> zero_point;
  FakeQuantizeArgs args;
};

struct Output {
  std::vector<uint8_t> y, mask;
  bool operator==(const Output&) const = default;
};

// All bytes of the outputs, guards included, of a call on [begin, end).
Output output(Path path, FakeQuantizeArgs args, int64_t size, int64_t begin, int64_t end,
              bool with_mask) {
  Guarded<float> y(size, 1);
  Guarded<uint8_t> mask((size + 7) / 8, 1);
  args.y = y.data();
  if (with_mask) args.mask = mask.data();
  run_on(path, Kernel::fake_quantize, [&] { fake_quantize(args, begin, end); });
  return {y.bytes(), mask.bytes()};
}

QT_FOR_EACH_PATH(FakeQuantize, fake_quantize);
QT_FOR_EACH_PATH(MaskGradient, mask_gradient);

TEST_P(FakeQuantize, GivesTheReferencesBits) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    for (const Range& range : kRanges) {
      for (const bool relu : {false, true}) {
        Problem problem(shape, range, seed++);
        problem.args.relu = relu;
        const int64_t size = shape.size();
        // Parts start at whole bytes of the mask; without one, anywhere.
        const int64_t cuts[][2] = {{0, size},
                                   {size / 3 / 8 * 8, size},
                                   {0, size / 2 / 8 * 8},
                                   {size / 4 / 8 * 8, size - size / 5 / 8 * 8}};
        for (const auto& [begin, end] : cuts) {
          EXPECT_EQ(output(GetParam(), problem.args, size, begin, end, true),
                    output(Path::reference, problem.args, size, begin, end, true))
              << problem.text() << ", elements " << begin << " to " << end;
        }
        const int64_t begin = size / 3, end = size - size / 5;
        EXPECT_EQ(output(GetParam(), problem.args, size, begin, end, false),
                  output(Path::reference, problem.args, size, begin, end, false))
            << problem.text() << " without a mask, elements " << begin << " to " << end;
      }
    }
  }
}

TEST_P(FakeQuantize, TakesPartsOfTheMemory) {
  for (const Shape& shape : {Shape{2, 7, 100, 100}, Shape{1, 7, 100, 32}, Shape{70, 10, 1, 1}}) {
    const Problem problem(shape, {0, 255}, 5);
    const int64_t size = shape.size();
    const Output whole = output(Path::reference, problem.args, size, 0, size, true);
    Guarded<float> y(size, 1);
    Guarded<uint8_t> mask((size + 7) / 8, 1);
    FakeQuantizeArgs args = problem.args;
    args.mask = mask.data();
    for (int64_t begin = 0; begin < size; begin += 136) {
      args.first = begin;
      args.x = problem.x.data() + begin;
      args.y = y.data() + begin;
      const int64_t end = std::min(begin + 136, size);
      run_on(GetParam(), Kernel::fake_quantize, [&] { fake_quantize(args, begin, end); });
    }
    EXPECT_EQ((Output{y.bytes(), mask.bytes()}), whole) << problem.text();
  }
}

TEST_P(FakeQuantize, WorksInPlace) {
  const Problem problem({1, 1, 1000, 1000}, {0, 255}, 77);
  std::vector<float> expected(1000), actual = problem.x;
  FakeQuantizeArgs args = problem.args;
  args.y = expected.data();
  run_on(Path::reference, Kernel::fake_quantize, [&] { fake_quantize(args, 0, 1000); });
  args.x = args.y = actual.data();
  run_on(GetParam(), Kernel::fake_quantize, [&] { fake_quantize(args, 0, 1000); });
  EXPECT_EQ(std::memcmp(actual.data(), expected.data(), 4000), 0);
}

// The rule in wide arithmetic: only the product is rounded to float32.
TEST(FakeQuantizeReference, FollowsTheRule) {
  uint64_t seed = 1000;
  for (const Shape& shape : kShapes) {
    for (const Range& range : kRanges) {
      for (const bool relu : {false, true}) {
        const Problem problem(shape, range, seed++);
        const int64_t size = shape.size();
        std::vector<float> fake(size);
        std::vector<uint8_t> mask((size + 7) / 8, 0xff);
        FakeQuantizeArgs args = problem.args;
        args.relu = relu;
        args.y = fake.data();
        args.mask = mask.data();
        run_on(Path::reference, Kernel::fake_quantize, [&] { fake_quantize(args, 0, size); });
        for (int64_t i = 0; i < static_cast<int64_t>(mask.size()) * 8; ++i) {
          const bool passes = ((mask[i / 8] >> (i % 8)) & 1) != 0;
          if (i >= size) {
            EXPECT_FALSE(passes) << problem.text() << " at " << i;
            continue;
          }
          const int64_t c = shape.parameter_of(i);
          const float x = problem.x[i], s = problem.scale[c];
          const float active = relu && x < 0 ? 0.0f : x;
          const auto product = static_cast<double>(active * (1.0f / s));
          const double code = std::nearbyint(product) + problem.zero_point[c];
          const bool inside =
              code >= range.quant_min && code <= range.quant_max && (!relu || x > 0);
          EXPECT_EQ(passes, inside) << problem.text() << " at " << i << ", x " << x;
          if (std::isnan(x)) {
            EXPECT_TRUE(std::isnan(fake[i]));
            continue;
          }
          const double clamped = std::isnan(product)
                                     ? problem.zero_point[c]
                                     : std::clamp<double>(code, range.quant_min, range.quant_max);
          EXPECT_EQ(fake[i], static_cast<float>((clamped - problem.zero_point[c]) * s))
              << problem.text() << " at " << i << ", x " << x;
        }
      }
    }
  }
}

TEST_P(FakeQuantize, HandComputedValues) {
  const std::vector<float> x = {0.3f,      -0.3f,      1.0f,   100.0f, -100.0f,
                                kInfinity, -kInfinity, -0.01f, kNaN};
  const float scale = 0.25f;
  const int32_t zero_point = 2;
  std::vector<float> y(x.size());
  std::vector<uint8_t> mask(2, 0xff);
  FakeQuantizeArgs args;
  args.scale = &scale;
  args.zero_point = &zero_point;
  args.quant_min = -8;
  args.quant_max = 7;
  args.x = x.data();
  args.y = y.data();
  args.mask = mask.data();
  const auto run = [&] {
    run_on(GetParam(), Kernel::fake_quantize,
           [&] { fake_quantize(args, 0, static_cast<int64_t>(x.size())); });
    EXPECT_TRUE(std::isnan(y.back()));
    return std::vector<float>(y.begin(), y.end() - 1);
  };
  EXPECT_EQ(run(), (std::vector<float>{0.25f, -0.25f, 1.0f, 1.25f, -2.5f, 1.25f, -2.5f, 0.0f}));
  EXPECT_FALSE(std::signbit(y[7]));
  EXPECT_EQ(mask, (std::vector<uint8_t>{0b10000111, 0}));
  args.relu = true;
  EXPECT_EQ(run(), (std::vector<float>{0.25f, 0.0f, 1.0f, 1.25f, 0.0f, 1.25f, 0.0f, 0.0f}));
  EXPECT_EQ(mask, (std::vector<uint8_t>{0b00000101, 0}));
}

TEST_P(FakeQuantize, GradientPassesUpToTheRangesEndAndItsTie) {
  // Codes 0 and 3 are the ends: -0.5 rounds to 0 (inside), 3.5 to 4 (outside).
  const std::vector<float> x = {-0.51f, -0.5f, 0.0f, 3.0f, 3.49f, 3.5f, kNaN, kInfinity, -FLT_MAX};
  const float scale = 1.0f;
  const int32_t zero_point = 0;
  std::vector<float> y(x.size());
  std::vector<uint8_t> mask(2, 0xff);
  FakeQuantizeArgs args;
  args.scale = &scale;
  args.zero_point = &zero_point;
  args.quant_max = 3;
  args.x = x.data();
  args.y = y.data();
  args.mask = mask.data();
  run_on(GetParam(), Kernel::fake_quantize, [&] { fake_quantize(args, 0, 9); });
  EXPECT_EQ(mask, (std::vector<uint8_t>{0b00011110, 0}));
}

template <class Bits>
void expect_masked(Path path, int64_t size, int64_t begin, int64_t end, bool in_place) {
  Random random(static_cast<uint64_t>(size * 3 + begin));
  const std::vector<uint8_t> mask = random.codes((size + 7) / 8);
  Guarded<Bits> grad(size, 1), y(size, 1);
  Guarded<Bits> expected(size, 1);
  for (int64_t i = 0; i < size; ++i) {
    grad.data()[i] = static_cast<Bits>(random.bits());
    if (in_place) expected.data()[i] = grad.data()[i];
  }
  for (int64_t i = begin; i < end; ++i) {
    expected.data()[i] = ((mask[i / 8] >> (i % 8)) & 1) != 0 ? grad.data()[i] : Bits{0};
  }
  Guarded<Bits>& result = in_place ? grad : y;
  const MaskGradientArgs args{
      .element_bytes = sizeof(Bits), .grad = grad.data(), .mask = mask.data(), .y = result.data()};
  run_on(path, Kernel::mask_gradient, [&] { mask_gradient(args, begin, end); });
  EXPECT_EQ(result.bytes(), expected.bytes())
      << sizeof(Bits) << " bytes, size " << size << ", elements " << begin << " to " << end;
}

TEST_P(MaskGradient, SelectsByBits) {
  for (const int64_t size : {0, 1, 7, 8, 9, 31, 63, 64, 65, 127, 128, 130, 1000}) {
    for (const bool in_place : {false, true}) {
      expect_masked<uint32_t>(GetParam(), size, 0, size, in_place);
      expect_masked<uint16_t>(GetParam(), size, 0, size, in_place);
      expect_masked<uint32_t>(GetParam(), size, size / 3 / 8 * 8, size, in_place);
      expect_masked<uint16_t>(GetParam(), size, size / 3 / 8 * 8, size - size / 4, in_place);
    }
  }
}

}  // namespace
}  // namespace qtoolkit::kernels
