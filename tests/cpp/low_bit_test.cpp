#include "kernels/low_bit.h"

#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/formats.h"
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

// Sizes around every vector width and chunk, per tensor, per channel, and with the channels last.
const Shape kShapes[] = {{1, 1, 0},   {1, 1, 1},    {1, 1, 15}, {1, 1, 17}, {1, 1, 255},
                         {1, 1, 256}, {1, 1, 777},  {2, 3, 1},  {5, 17, 1}, {3, 300, 1},
                         {2, 3, 9},   {1, 16, 147}, {3, 5, 64}, {2, 2, 600}};

FloatFormat format_named(std::string_view name) {
  const Format& format = format_of(name);
  return {format.mantissa_bits, format.min_exponent, static_cast<float>(format.max_value)};
}

struct Problem {
  Problem(const Shape& shape, uint64_t seed) : shape(shape) {
    Random random(seed);
    for (int64_t c = 0; c < shape.channels; ++c) {
      // Powers of two, so that exact ties occur, and a scale so small that its inverse is infinite.
      const float choices[] = {0.25f, 0.0078125f, 1.0f, 0.0371f, 3.3f, 1e-40f};
      scale.push_back(choices[random.integer(0, 5)]);
      threshold.push_back(scale.back() * 2.5f);
    }
    const float specials[] = {kNaN,    -kNaN,    kInfinity,    -kInfinity,    FLT_MAX, -FLT_MAX,
                              FLT_MIN, -FLT_MIN, FLT_TRUE_MIN, -FLT_TRUE_MIN, 0.0f,    -0.0f,
                              65504.f, 65520.0f, 448.0f,       464.0f};
    for (int64_t i = 0; i < shape.size(); ++i) {
      const float s = scale[i / shape.inner % shape.channels];
      switch (random.integer(0, 4)) {
        case 0:
          x.push_back(specials[random.integer(0, 15)]);
          break;
        case 1:
          x.push_back(static_cast<float>(random.integer(-64, 64)) * 0.25f * s);
          break;
        case 2: {
          const uint32_t bits = random.bits();
          float any;
          std::memcpy(&any, &bits, sizeof any);
          x.push_back(any);
          break;
        }
        default:
          x.push_back(random.real(-8.0f, 8.0f) * s);
      }
    }
  }
  Problem(const Problem&) = delete;

  std::string text() const {
    return std::to_string(shape.outer) + "x" + std::to_string(shape.channels) + "x" +
           std::to_string(shape.inner);
  }

  Shape shape;
  std::vector<float> scale, threshold, x;
};

struct Outcome {
  std::vector<uint8_t> y, mask;
  bool operator==(const Outcome&) const = default;
};

// Elements [begin, end), of which x and y start at element `begin`.
template <class Args>
Outcome run(Path path, Kernel kernel, void (*function)(const Args&, int64_t, int64_t), Args args,
            const Problem& problem, bool with_mask, int64_t begin, int64_t end) {
  const int64_t size = problem.shape.size();
  Guarded<float> y(size, 1);
  Guarded<uint8_t> mask((size + 7) / 8);
  args.common.channels = problem.shape.channels;
  args.common.inner = problem.shape.inner;
  args.common.scale = problem.scale.data();
  args.common.first = begin;
  args.common.x = problem.x.data() + begin;
  args.common.y = y.data() + begin;
  if (with_mask) args.common.mask = mask.data();
  run_on(path, kernel, [&] { function(args, begin, end); });
  return {y.bytes(), mask.bytes()};
}

template <class Args>
void expect_reference_bits(Path path, Kernel kernel,
                           void (*function)(const Args&, int64_t, int64_t), bool has_mask,
                           Args args, const float* (*threshold)(const Problem&) = nullptr) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    const Problem problem(shape, seed++);
    if constexpr (requires { args.threshold; }) args.threshold = threshold(problem);
    const int64_t size = shape.size();
    const int64_t cuts[][2] = {{0, size}, {size / 3 / 8 * 8, size - size / 5}};
    for (const auto& [begin, end] : cuts) {
      for (const bool with_mask : {false, has_mask}) {
        EXPECT_EQ(run(path, kernel, function, args, problem, with_mask, begin, end),
                  run(Path::reference, kernel, function, args, problem, with_mask, begin, end))
            << problem.text() << ", elements " << begin << " to " << end;
      }
    }
  }
}

QT_FOR_EACH_PATH(Ternary, fake_quantize_ternary);
QT_FOR_EACH_PATH(Binary, fake_quantize_binary);
QT_FOR_EACH_PATH(SmallFloat, fake_quantize_float);
QT_FOR_EACH_PATH(BlockFloat, fake_quantize_block_float);

const float* threshold_of(const Problem& problem) { return problem.threshold.data(); }

TEST_P(Ternary, GivesTheReferencesBits) {
  expect_reference_bits<TernaryArgs>(GetParam(), Kernel::fake_quantize_ternary,
                                     fake_quantize_ternary, false, {}, threshold_of);
}

TEST_P(Binary, GivesTheReferencesBits) {
  for (const float clip : {0.0f, 1.0f, kInfinity}) {
    expect_reference_bits<BinaryArgs>(GetParam(), Kernel::fake_quantize_binary,
                                      fake_quantize_binary, true, {.clip = clip});
  }
}

TEST_P(SmallFloat, GivesTheReferencesBits) {
  for (const Format& format : formats()) {
    if (format.mantissa_bits == 0) continue;
    expect_reference_bits<FloatArgs>(GetParam(), Kernel::fake_quantize_float, fake_quantize_float,
                                     true, {.format = format_named(format.name)});
  }
}

TEST_P(BlockFloat, GivesTheReferencesBits) {
  uint64_t seed = 500;
  for (const char* name : {"mxfp4", "mxfp8", "fp8_e5m2"}) {
    for (const int64_t block : {1, 16, 32, 100}) {
      for (const float tensor_scale : {0.0f, 0.01f, 1e-20f, 1e30f}) {
        const Problem problem({1, 1, 777}, seed++);
        BlockFloatArgs args{.format = format_named(name),
                            .length = 777,
                            .block = block,
                            .tensor_scale = tensor_scale,
                            .x = problem.x.data()};
        Guarded<float> expected(777, 1), actual(777, 1);
        args.y = expected.data();
        run_on(Path::reference, Kernel::fake_quantize_block_float,
               [&] { fake_quantize_block_float(args, 0, (777 + block - 1) / block); });
        args.y = actual.data();
        run_on(GetParam(), Kernel::fake_quantize_block_float,
               [&] { fake_quantize_block_float(args, 0, (777 + block - 1) / block); });
        EXPECT_EQ(actual.bytes(), expected.bytes())
            << name << ", block " << block << ", tensor_scale " << tensor_scale;
      }
    }
  }
}

TEST_P(Ternary, HandComputedValues) {
  const std::vector<float> x = {0.5f, -0.5f, 0.51f, -0.51f, 0.0f, kInfinity, -kInfinity};
  const float scale = 2.0f, threshold = 0.5f;
  std::vector<float> y(x.size());
  TernaryArgs args{.threshold = &threshold};
  args.common.scale = &scale;
  args.common.x = x.data();
  args.common.y = y.data();
  run_on(GetParam(), Kernel::fake_quantize_ternary, [&] { fake_quantize_ternary(args, 0, 7); });
  EXPECT_EQ(y, (std::vector<float>{0, 0, 2, -2, 0, 2, -2}));
}

TEST_P(Binary, HandComputedValues) {
  const std::vector<float> x = {0.0f, -0.0f, 1.0f, -1.0f, 1.01f, -kInfinity, kInfinity, kNaN, 0.5f};
  const float scale = 3.0f;
  std::vector<float> y(x.size());
  std::vector<uint8_t> mask(2, 0xff);
  BinaryArgs args{.clip = 1.0f};
  args.common.scale = &scale;
  args.common.x = x.data();
  args.common.y = y.data();
  args.common.mask = mask.data();
  run_on(GetParam(), Kernel::fake_quantize_binary, [&] { fake_quantize_binary(args, 0, 9); });
  EXPECT_TRUE(std::isnan(y[7]));
  y[7] = 0;
  EXPECT_EQ(y, (std::vector<float>{3, 3, 3, -3, 3, -3, 3, 0, 3}));
  EXPECT_EQ(mask, (std::vector<uint8_t>{0b00001111, 1}));
}

TEST_P(SmallFloat, HandComputedValuesOfE2m1) {
  // The numbers are 0, 0.5, 1, 1.5, 2, 3, 4, 6.
  const std::vector<float> x = {0.25f, 0.26f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f, 5.01f, 7.0f};
  const std::vector<float> expected = {0, 0.5f, 1, 1, 2, 2, 4, 4, 6, 6};
  const float scale = 1.0f;
  std::vector<float> y(x.size());
  std::vector<uint8_t> mask(2);
  FloatArgs args{.format = format_named("mxfp4")};
  args.common.scale = &scale;
  args.common.x = x.data();
  args.common.y = y.data();
  args.common.mask = mask.data();
  run_on(GetParam(), Kernel::fake_quantize_float, [&] { fake_quantize_float(args, 0, 10); });
  EXPECT_EQ(y, expected);
  EXPECT_EQ(mask, (std::vector<uint8_t>{0xff, 1}));
}

TEST_P(BlockFloat, HandComputedValuesOfMxfp4) {
  // amax 13: 2^(3 - 2) = 2; amax 0.3: 2^(-2 - 2).
  const std::vector<float> x = {10.0f, -1.0f, 3.1f, 13.0f, 0.3f, 0.1f, 0.0f, -0.28f};
  const std::vector<float> expected = {8.0f, -1.0f, 3.0f, 12.0f, 0.25f, 0.09375f, 0.0f, -0.25f};
  std::vector<float> y(x.size());
  const BlockFloatArgs args{
      .format = format_named("mxfp4"), .length = 8, .block = 4, .x = x.data(), .y = y.data()};
  run_on(GetParam(), Kernel::fake_quantize_block_float,
         [&] { fake_quantize_block_float(args, 0, 2); });
  EXPECT_EQ(y, expected);
}

}  // namespace
}  // namespace qtoolkit::kernels
