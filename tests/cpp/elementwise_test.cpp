#include "kernels/elementwise.h"

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

QT_FOR_EACH_PATH(Requantize, requantize);

struct Output {
  int32_t zero_point, lo, hi;
};
// Unsigned, signed, with ReLU, narrow, and a zero point outside the bounds.
const Output kOutputs[] = {{100, 0, 255}, {-3, -128, 127}, {20, 20, 255}, {0, 0, 15}, {7, 9, 200}};

int32_t value_of(uint8_t code, bool is_signed) {
  return is_signed ? static_cast<int8_t>(code) : code;
}

// The rounding rule in wide arithmetic; value is rounded to float32 already.
uint8_t code_by_rule(float value, const Output& output) {
  const double rounded = std::isnan(value) ? 0.0 : std::nearbyint(static_cast<double>(value));
  return static_cast<uint8_t>(
      static_cast<int64_t>(std::clamp<double>(rounded + output.zero_point, output.lo, output.hi)));
}

struct Rows {
  int64_t rows, channels, x_gap, y_gap;
};
const Rows kRows[] = {{0, 5, 0, 0},   {1, 1, 0, 0},    {7, 3, 0, 0},   {5, 15, 2, 0},
                      {4, 17, 0, 3},  {3, 63, 1, 1},   {3, 64, 0, 0},  {2, 65, 0, 64},
                      {2, 128, 5, 0}, {1, 1000, 0, 0}, {300, 1, 0, 0}, {50, 24, 0, 40}};

// Calls check(args, text) for every kind of requantization; y is the caller's.
template <class Check>
void for_each_requantization(Check check) {
  Random random(3);
  for (const Rows& rows : kRows) {
    const int64_t x_stride = rows.channels + rows.x_gap, y_stride = rows.channels + rows.y_gap;
    const std::vector<uint8_t> x = random.codes(rows.rows * x_stride);
    const std::vector<float> addend = random.reals(rows.channels, -50.0f, 50.0f);
    std::vector<float> multiplier = random.reals(rows.channels, -0.5f, 1.5f);
    for (size_t c = 0; c < multiplier.size(); c += 2) multiplier[c] = 0.5f;
    if (rows.channels > 6) multiplier[3] = 3e38f, multiplier[5] = -INFINITY;
    for (const Output& output : kOutputs) {
      for (int options = 0; options < 8; ++options) {
        RequantizeArgs args;
        args.x = x.data();
        args.channels = rows.channels;
        args.x_row_stride = x_stride;
        args.y_row_stride = y_stride;
        args.x_signed = (options & 1) != 0;
        args.x_zero_point = args.x_signed ? -5 : 120;
        args.channels_apart = (options & 2) != 0;
        args.multiplier = multiplier.data();
        args.addend = (options & 4) != 0 ? addend.data() : nullptr;
        args.zero_point = output.zero_point;
        args.lo = output.lo;
        args.hi = output.hi;
        check(args, rows, output,
              std::to_string(rows.rows) + " rows of " + std::to_string(rows.channels) +
                  ", options " + std::to_string(options));
      }
    }
  }
}

TEST_P(Requantize, GivesTheReferencesBits) {
  for_each_requantization(
      [&](RequantizeArgs args, const Rows& rows, const Output&, const std::string& text) {
        const int64_t cuts[][2] = {{0, rows.rows}, {rows.rows / 3, rows.rows - rows.rows / 5}};
        for (const auto& cut : cuts) {
          Guarded<uint8_t> expected(rows.rows * args.y_row_stride, 1);
          Guarded<uint8_t> actual(rows.rows * args.y_row_stride, 1);
          args.y = expected.data();
          run_on(Path::reference, Kernel::requantize, [&] { requantize(args, cut[0], cut[1]); });
          args.y = actual.data();
          run_on(GetParam(), Kernel::requantize, [&] { requantize(args, cut[0], cut[1]); });
          EXPECT_EQ(actual.bytes(), expected.bytes()) << text;
        }
      });
}

TEST(RequantizeReference, FollowsTheRule) {
  for_each_requantization([&](RequantizeArgs args, const Rows& rows, const Output& output,
                              const std::string& text) {
    std::vector<uint8_t> y(rows.rows * args.y_row_stride, 0xA5);
    args.y = y.data();
    run_on(Path::reference, Kernel::requantize, [&] { requantize(args, 0, rows.rows); });
    for (int64_t row = 0; row < rows.rows; ++row) {
      for (int64_t c = 0; c < args.y_row_stride; ++c) {
        uint8_t expected = 0xA5;
        if (c < rows.channels) {
          const int64_t k = args.channels_apart ? c : 0;
          const int64_t centred =
              value_of(args.x[row * args.x_row_stride + c], args.x_signed) - args.x_zero_point;
          float value = static_cast<float>(static_cast<double>(centred) * args.multiplier[k]);
          if (args.addend != nullptr) value += args.addend[k];
          expected = code_by_rule(value, output);
        }
        ASSERT_EQ(y[row * args.y_row_stride + c], expected) << text << " at " << row << ", " << c;
      }
    }
  });
}

TEST_P(Requantize, HandComputedValues) {
  const std::vector<uint8_t> x = {10, 11, 12, 13, 9, 255};
  const std::vector<float> multiplier = {0.5f, 2.0f}, addend = {0.0f, -1.0f};
  std::vector<uint8_t> y(6);
  RequantizeArgs args;
  args.x = x.data();
  args.y = y.data();
  args.channels = args.x_row_stride = args.y_row_stride = 2;
  args.x_zero_point = 10;
  args.channels_apart = true;
  args.multiplier = multiplier.data();
  args.addend = addend.data();
  args.zero_point = 4;
  run_on(GetParam(), Kernel::requantize, [&] { requantize(args, 0, 3); });
  // 0; 2 - 1; 1; 6 - 1; -0.5 (to even: 0); 490 - 1
  EXPECT_EQ(y, (std::vector<uint8_t>{4, 5, 5, 9, 4, 255}));
}

}  // namespace
}  // namespace qtoolkit::kernels
