#include "kernels/layer_norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(LayerNorm, layer_norm);

using testing::GuardedBuffer;

constexpr int64_t kRows = 4;
const int64_t kLengths[] = {1, 2, 7, 16, 17, 63, 64, 65, 96, 129, 768, 1000};

struct Setting {
  double x_scale, eps;
  int32_t x_zero_point, zero_point, lo, hi;
  bool is_signed;
  float weight;
};
const Setting kSettings[] = {{0.02, 1e-5, 128, 100, 0, 255, false, 30.0f},
                             {0.5, 1e-6, -7, 3, -128, 127, true, 50.0f},
                             {1e-30, 1e-5, 0, 9, 0, 200, false, 1e4f},
                             {1e30, 0.0, 255, 0, 0, 255, false, 20.0f},
                             {1.0, 0.1, -128, 0, -128, 127, true, 1e38f}};

template <class Check>
void for_each_case(Check check) {
  Random random(1);
  for (int64_t length : kLengths) {
    for (const Setting& s : kSettings) {
      GuardedBuffer<uint8_t> x(kRows * (length + 1) - 1);  // rows lie a byte apart
      for (uint8_t& code : x) code = static_cast<uint8_t>(random.bits());
      for (int64_t i = 0; i < length; ++i) x[i] = 200;  // a row of equal codes
      for (int64_t i = 0; i < length; ++i) x[length + 1 + i] = i % 2 == 0 ? 127 : 128;
      GuardedBuffer<float> weight(length), bias(length);
      for (float& value : weight) value = s.weight * random.real(-1, 1);
      for (float& value : bias) value = random.real(-20, 20);
      LayerNormArgs args;
      args.x = x.data();
      args.is_signed = s.is_signed;
      args.length = length;
      args.x_row_stride = length + 1;
      args.y_row_stride = length + 3;
      args.weight = weight.data();
      args.bias = bias.data();
      args.x_scale = s.x_scale;
      args.eps = s.eps;
      args.x_zero_point = s.x_zero_point;
      args.zero_point = s.zero_point;
      args.lo = s.lo;
      args.hi = s.hi;
      check(args, std::to_string(length) + " codes of scale " + std::to_string(s.x_scale));
    }
  }
}

template <class T>
std::vector<uint8_t> output(Path path, LayerNormArgs args, int64_t begin, int64_t end) {
  Guarded<T> y(kRows * args.y_row_stride, 1);
  if constexpr (sizeof(T) == 4) {
    args.y_float = y.data();
  } else {
    args.y = y.data();
  }
  run_on(path, Kernel::layer_norm, [&] { layer_norm(args, begin, end); });
  return y.bytes();
}

TEST_P(LayerNorm, GivesTheReferencesBits) {
  for_each_case([&](const LayerNormArgs& args, const std::string& text) {
    for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, kRows}, {1, 3}, {2, 2}}) {
      EXPECT_EQ(output<uint8_t>(GetParam(), args, begin, end),
                output<uint8_t>(Path::reference, args, begin, end))
          << text;
      EXPECT_EQ(output<float>(GetParam(), args, begin, end),
                output<float>(Path::reference, args, begin, end))
          << text;
    }
  });
}

TEST_P(LayerNorm, SumsLongRowsExactly) {
  const int64_t length = (int64_t{1} << 20) + 77;
  std::vector<uint8_t> x(length, 255);
  x[length - 1] = 0;
  const std::vector<float> weight(length, 1.0f), bias(length, 0.0f);
  LayerNormArgs args;
  args.x = x.data();
  args.length = args.x_row_stride = args.y_row_stride = length;
  args.weight = weight.data();
  args.bias = bias.data();
  std::vector<float> y(length);
  args.y_float = y.data();
  run_on(GetParam(), Kernel::layer_norm, [&] { layer_norm(args, 0, 1); });
  // One of n values lies off the others: by -sqrt(n - 1) deviations, they by its inverse.
  const double root = std::sqrt(static_cast<double>(length - 1));
  EXPECT_NEAR(y[length - 1], -root, 1e-3);
  EXPECT_NEAR(y[0], 1 / root, 1e-4);
}

TEST(LayerNormReference, IsNearTheExactNorm) {
  for_each_case([&](LayerNormArgs args, const std::string& text) {
    if (args.weight[0] != args.weight[0] || std::abs(args.weight[0]) > 1e6f) return;
    std::vector<float> y(kRows * args.y_row_stride);
    args.y_float = y.data();
    run_on(Path::reference, Kernel::layer_norm, [&] { layer_norm(args, 0, kRows); });
    for (int64_t row = 0; row < kRows; ++row) {
      std::vector<double> real;
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < args.length; ++i) {
        const uint8_t code = args.x[row * args.x_row_stride + i];
        const int32_t value = args.is_signed ? static_cast<int8_t>(code) : int32_t{code};
        real.push_back(args.x_scale * (value - args.x_zero_point));
        sum += real.back();
      }
      const double mean = sum / static_cast<double>(args.length);
      for (double& value : real) squares += (value - mean) * (value - mean);
      const double deviation = std::sqrt(squares / static_cast<double>(args.length) + args.eps);
      if (deviation < 1e-9 * std::abs(mean)) continue;  // NaN where eps is 0 too
      for (int64_t i = 0; i < args.length; ++i) {
        const double exact = (real[i] - mean) / deviation * args.weight[i] + args.bias[i];
        const double size = std::abs(args.weight[i]) + std::abs(exact) + 1;
        ASSERT_NEAR(y[row * args.y_row_stride + i], exact, 1e-6 * size) << text;
      }
    }
  });
}

TEST_P(LayerNorm, HandComputedValues) {
  const std::vector<uint8_t> x = {10, 14, 10, 14};  // deviations of -1, 1, -1, 1
  const std::vector<float> weight = {1.0f, 2.0f, 3.0f, 100.0f}, bias = {0.5f, 0.5f, 0.0f, 0.0f};
  LayerNormArgs args;
  args.x = x.data();
  args.length = args.x_row_stride = args.y_row_stride = 4;
  args.weight = weight.data();
  args.bias = bias.data();
  args.x_zero_point = 8;
  args.zero_point = 50;
  args.hi = 99;
  std::vector<uint8_t> y(4);
  args.y = y.data();
  run_on(GetParam(), Kernel::layer_norm, [&] { layer_norm(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{50, 52, 47, 99}));  // -0.5 and 2.5, to even
}

}  // namespace
}  // namespace qtoolkit::kernels
