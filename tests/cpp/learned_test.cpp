#include "kernels/learned.h"

#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t rows, channels;
};

// Sizes around every vector width, of one channel and of many.
const Shape kShapes[] = {{0, 1},   {1, 1},    {15, 1}, {16, 1}, {17, 1}, {63, 1}, {64, 1},
                         {333, 1}, {2048, 1}, {5, 3},  {1, 17}, {7, 64}, {3, 65}, {40, 2}};

struct Problem {
  Problem(const Shape& shape, uint64_t seed) : shape(shape) {
    Random random(seed);
    for (int64_t c = 0; c < shape.channels; ++c) {
      const float choices[] = {0.25f, 0.0078125f, 1.0f, 0.0371f, 3.3f, 0x1p-100f};
      const int64_t zero_point = random.integer(-8, 7);
      scale.push_back(choices[random.integer(0, 5)]);
      inverse_scale.push_back(1.0f / scale.back());
      low.push_back(static_cast<float>(-8 - zero_point));
      high.push_back(static_cast<float>(7 - zero_point));
    }
    const float specials[] = {kNaN,    kInfinity, -kInfinity,   FLT_MAX, -FLT_MAX,
                              FLT_MIN, -FLT_MIN,  FLT_TRUE_MIN, 0.0f,    -0.0f};
    const int64_t size = shape.rows * shape.channels;
    for (int64_t i = 0; i < size; ++i) {
      const float s = scale[i % shape.channels];
      const int64_t kind = random.integer(0, 9);
      if (kind == 0) {
        x.push_back(specials[random.integer(0, 9)]);
      } else if (kind < 4) {
        x.push_back((static_cast<float>(random.integer(-20, 20)) + 0.5f) * s);
      } else {
        x.push_back(random.real(-20.0f, 20.0f) * s);
      }
    }
    grad = random.reals(size, -1.0f, 1.0f);
  }

  Shape shape;
  std::vector<float> scale, inverse_scale, low, high, x, grad;
};

// Everything that a call writes, with guards.
struct Outcome {
  std::vector<uint8_t> grad_x, first, second;
  bool operator==(const Outcome&) const = default;
};

Outcome run_lsq(Path path, const Problem& problem, int64_t begin, int64_t end) {
  Guarded<float> grad_x(problem.shape.rows * problem.shape.channels, 1);
  Guarded<double> scale_sums(problem.shape.channels), outside_sums(problem.shape.channels);
  for (int64_t c = 0; c < problem.shape.channels; ++c) {
    scale_sums.data()[c] = 0.1;  // sums are added to
    outside_sums.data()[c] = -0.3;
  }
  const LsqBackwardArgs args = {.sum = {.channels = problem.shape.channels,
                                        .x = problem.x.data(),
                                        .grad = problem.grad.data(),
                                        .grad_x = grad_x.data()},
                                .inverse_scale = problem.inverse_scale.data(),
                                .low = problem.low.data(),
                                .high = problem.high.data(),
                                .scale_sums = scale_sums.data(),
                                .outside_sums = outside_sums.data()};
  run_on(path, Kernel::fake_quantize_lsq_backward,
         [&] { fake_quantize_lsq_backward(args, begin, end); });
  return {grad_x.bytes(), scale_sums.bytes(), outside_sums.bytes()};
}

Outcome run_pact(Path path, const Problem& problem, int64_t begin, int64_t end) {
  Guarded<float> grad_x(problem.shape.rows, 1);
  Guarded<double> sum(1);
  sum.data()[0] = 0.1;
  const PactBackwardArgs args = {
      .sum = {.x = problem.x.data(), .grad = problem.grad.data(), .grad_x = grad_x.data()},
      .alpha = problem.scale[0] * 7.0f,
      .alpha_sum = sum.data()};
  run_on(path, Kernel::fake_quantize_pact_backward,
         [&] { fake_quantize_pact_backward(args, begin, end); });
  return {grad_x.bytes(), sum.bytes(), {}};
}

QT_FOR_EACH_PATH(LsqBackward, fake_quantize_lsq_backward);
QT_FOR_EACH_PATH(PactBackward, fake_quantize_pact_backward);

TEST_P(LsqBackward, GivesTheReferencesBits) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    const Problem problem(shape, seed++);
    const int64_t cuts[][2] = {
        {0, shape.rows}, {shape.rows / 3, shape.rows - shape.rows / 5}, {0, 0}};
    for (const auto& [begin, end] : cuts) {
      EXPECT_EQ(run_lsq(GetParam(), problem, begin, end),
                run_lsq(Path::reference, problem, begin, end))
          << shape.rows << "x" << shape.channels << ", rows " << begin << " to " << end;
    }
  }
}

TEST_P(PactBackward, GivesTheReferencesBits) {
  uint64_t seed = 100;
  for (const Shape& shape : kShapes) {
    if (shape.channels > 1) continue;
    const Problem problem(shape, seed++);
    const int64_t cuts[][2] = {{0, shape.rows}, {shape.rows / 3, shape.rows - shape.rows / 5}};
    for (const auto& [begin, end] : cuts) {
      EXPECT_EQ(run_pact(GetParam(), problem, begin, end),
                run_pact(Path::reference, problem, begin, end))
          << shape.rows << ", elements " << begin << " to " << end;
    }
  }
}

TEST_P(LsqBackward, HandComputedValues) {
  // Codes 0..3 with scale 2 and zero point 1: low -1, high 2.
  const std::vector<float> x = {-3.0f, -2.5f, 1.0f, 0.5f, 5.0f, 6.0f, kNaN, kInfinity, -kInfinity};
  const std::vector<float> grad = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f, 8.0f, 9.0f};
  // x / scale: -1.5 (to -2), -1.25 (to -1), 0.5 (to 0), 0.25 (to 0), 2.5 (to 2), 3.
  const std::vector<float> expected = {0, 2, 3, 4, 5, 0, 0, 0, 0};
  const float inverse_scale = 0.5f, low = -1.0f, high = 2.0f;
  std::vector<float> grad_x(x.size());
  double scale_sum = 0.0, outside_sum = 0.0;
  const LsqBackwardArgs args = {
      .sum = {.x = x.data(), .grad = grad.data(), .grad_x = grad_x.data()},
      .inverse_scale = &inverse_scale,
      .low = &low,
      .high = &high,
      .scale_sums = &scale_sum,
      .outside_sums = &outside_sum};
  run_on(GetParam(), Kernel::fake_quantize_lsq_backward,
         [&] { fake_quantize_lsq_backward(args, 0, static_cast<int64_t>(x.size())); });
  EXPECT_EQ(grad_x, expected);
  EXPECT_EQ(scale_sum, 1 * -1 + 2 * 0.25 + 3 * -0.5 + 4 * -0.25 + 5 * -0.5 + (6 + 8) * 2 + 9 * -1);
  EXPECT_EQ(outside_sum, 1 + 6 + 8 + 9);
}

TEST_P(PactBackward, HandComputedValues) {
  const std::vector<float> x = {-1.0f, -0.0f, 0.0f, 0.5f, 3.9f, 4.0f, 5.0f, kInfinity, kNaN};
  const std::vector<float> grad = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f, 8.0f, 9.0f};
  std::vector<float> grad_x(x.size());
  double sum = 0.0;
  const PactBackwardArgs args = {
      .sum = {.x = x.data(), .grad = grad.data(), .grad_x = grad_x.data()},
      .alpha = 4.0f,
      .alpha_sum = &sum};
  run_on(GetParam(), Kernel::fake_quantize_pact_backward,
         [&] { fake_quantize_pact_backward(args, 0, static_cast<int64_t>(x.size())); });
  EXPECT_EQ(grad_x, (std::vector<float>{0, 2, 3, 4, 5, 0, 0, 0, 0}));
  EXPECT_EQ(sum, 6 + 7 + 8);
}

}  // namespace
}  // namespace qtoolkit::kernels
