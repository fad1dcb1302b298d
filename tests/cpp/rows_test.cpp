// Every path of the kernels that work on rows against the reference, bit for bit.

#include <gtest/gtest.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/value_range.h"
#include "guarded_buffer.h"
#include "kernels/quantize_rows.h"
#include "kernels/scale_sums.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

using testing::GuardedBuffer;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// NaN compares equal to NaN, whatever its bits.
void expect_same(const std::vector<float>& actual, const std::vector<float>& expected,
                 const std::string& text) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(actual[i]) && std::isnan(expected[i])) continue;
    ASSERT_EQ(std::bit_cast<uint32_t>(actual[i]), std::bit_cast<uint32_t>(expected[i]))
        << text << " at " << i << ": " << actual[i] << " and " << expected[i];
  }
}

// --- quantize_rows
// --------------------------------------------------------------------------------

struct Quantized {
  std::vector<uint8_t> codes;  // those between the rows too
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
};

Quantized quantized(Path path, const GuardedBuffer<float>& x, int64_t rows, int64_t width,
                    int64_t gap) {
  GuardedBuffer<uint8_t> codes(rows * (width + gap) - gap, 0xa5);
  Guarded<float> scale(rows);
  Guarded<int32_t> zero_point(rows);
  const QuantizeRowsArgs args{.x = x.data(),
                              .width = width,
                              .x_row_stride = width + gap,
                              .codes = codes.data(),
                              .codes_row_stride = width + gap,
                              .scale = scale.data(),
                              .zero_point = zero_point.data()};
  run_on(path, Kernel::quantize_rows, [&] {
    quantize_rows(args, 0, rows / 2);
    quantize_rows(args, rows / 2, rows);
  });
  return {{codes.begin(), codes.end()}, scale.values(), zero_point.values()};
}

// Rows of several magnitudes; some of one sign, constant, empty of values, or not finite.
GuardedBuffer<float> row_values(int64_t rows, int64_t width, int64_t gap, uint64_t seed) {
  GuardedBuffer<float> x(rows * (width + gap) - gap, kNaN);
  Random random(seed);
  for (int64_t row = 0; row < rows; ++row) {
    const float magnitude = std::ldexp(1.0f, static_cast<int>(random.integer(-120, 120)));
    const float low = row % 4 == 1 ? 0.0f : -1.0f, high = row % 4 == 2 ? 0.0f : 1.5f;
    float* to = x.data() + row * (width + gap);
    for (int64_t i = 0; i < width; ++i) to[i] = random.real(low, high) * magnitude;
    if (row % 8 == 3) std::fill_n(to, width, row % 16 == 3 ? 0.0f : -2.5f);
    const int64_t at = random.integer(0, width - 1);
    if (row % 8 == 4) to[at] = row % 16 == 4 ? FLT_MAX : FLT_TRUE_MIN;
    if (row % 8 == 5) to[at] = row % 16 == 5 ? kNaN : -kNaN;
    if (row % 8 == 6) to[at] = row % 16 == 6 ? kInfinity : -kInfinity;
  }
  return x;
}

QT_FOR_EACH_PATH(QuantizeRows, quantize_rows);

TEST_P(QuantizeRows, GivesTheReferencesBits) {
  uint64_t seed = 1;
  for (const int64_t width : {1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 255, 257, 1000}) {
    for (const int64_t gap : {0, 3}) {
      const int64_t rows = 33;
      const GuardedBuffer<float> x = row_values(rows, width, gap, seed++);
      const Quantized actual = quantized(GetParam(), x, rows, width, gap);
      const Quantized expected = quantized(Path::reference, x, rows, width, gap);
      const std::string text = "width " + std::to_string(width);
      EXPECT_EQ(actual.codes, expected.codes) << text;
      EXPECT_EQ(actual.zero_point, expected.zero_point) << text;
      expect_same(actual.scale, expected.scale, text);
    }
  }
}

TEST_P(QuantizeRows, RepresentsZeroAndBothEnds) {
  GuardedBuffer<float> x(4);
  const float values[] = {-1.0f, 0.0f, 0.5f, 3.0f};
  std::copy_n(values, 4, x.data());
  const Quantized actual = quantized(GetParam(), x, 1, 4, 0);
  EXPECT_EQ(actual.scale[0], 4.0f / 255.0f);
  EXPECT_EQ(actual.zero_point[0], 64);
  EXPECT_EQ(actual.codes, (std::vector<uint8_t>{0, 64, 96, 255}));
}

TEST_P(QuantizeRows, MarksRowsThatAreNotFinite) {
  for (const float value : {kNaN, kInfinity, -kInfinity}) {
    GuardedBuffer<float> x(100, 1.0f);
    x[70] = value;
    const Quantized actual = quantized(GetParam(), x, 2, 50, 0);
    EXPECT_EQ(actual.scale[0], 1.0f / 255.0f);
    EXPECT_TRUE(std::isnan(actual.scale[1]));
    EXPECT_EQ(actual.zero_point[1], 0);
    EXPECT_EQ(std::count(actual.codes.begin() + 50, actual.codes.end(), 0), 50);
  }
}

// --- scale_sums
// -----------------------------------------------------------------------------------

struct Variant {
  const char* name;
  Activation activation = Activation::none;
  bool bias = true, row_term = false, codes = false;
  int32_t zero_point = 0, lo = 0, hi = 255;
};
const Variant kVariants[] = {
    {.name = "plain", .bias = false},
    {.name = "bias"},
    {.name = "relu", .activation = Activation::relu},
    {.name = "gelu", .activation = Activation::gelu},
    {.name = "gelu_tanh", .activation = Activation::gelu_tanh, .row_term = true},
    {.name = "silu", .activation = Activation::silu, .bias = false},
    {.name = "codes", .row_term = true, .codes = true, .zero_point = 100},
    {.name = "narrow codes", .codes = true, .zero_point = 7, .lo = 5, .hi = 90},
    {.name = "signed codes", .codes = true, .zero_point = -9, .lo = -128, .hi = 127},
};

class Problem {
 public:
  Problem(const Variant& variant, int64_t rows, int64_t columns, uint64_t seed)
      : rows_(rows),
        columns_(columns),
        sums_(rows * (columns + kGap) - kGap),
        row_factor_(rows),
        row_term_(rows),
        row_scale_(rows),
        column_term_(columns),
        column_scale_(columns),
        bias_(columns) {
    Random random(seed);
    for (int32_t& sum : sums_) sum = static_cast<int32_t>(random.bits()) >> random.integer(0, 20);
    sums_[0] = std::numeric_limits<int32_t>::min();
    for (int32_t& value : row_factor_) value = static_cast<int32_t>(random.integer(0, 255));
    for (int32_t& value : row_term_) value = static_cast<int32_t>(random.bits());
    for (float& value : row_scale_) value = random.real(1e-7f, 2e-5f);
    row_scale_[rows / 2] = kNaN;
    row_scale_[rows - 1] = FLT_MAX;
    for (int32_t& value : column_term_) value = static_cast<int32_t>(random.bits()) >> 6;
    for (float& value : column_scale_) value = random.real(1e-3f, 1.0f);
    column_scale_[columns / 2] = 1e30f;
    for (float& value : bias_) value = random.real(-3.0f, 3.0f);
    args_ = {.sums = sums_.data(),
             .sums_row_stride = columns + kGap,
             .columns = columns,
             .row_factor = row_factor_.data(),
             .row_term = variant.row_term ? row_term_.data() : nullptr,
             .row_scale = row_scale_.data(),
             .column_term = column_term_.data(),
             .column_scale = column_scale_.data(),
             .bias = variant.bias ? bias_.data() : nullptr,
             .activation = variant.activation,
             .y_row_stride = columns + kGap,
             .zero_point = variant.zero_point,
             .lo = variant.lo,
             .hi = variant.hi};
  }
  Problem(const Problem&) = delete;

  std::vector<uint8_t> codes(Path path) {
    GuardedBuffer<uint8_t> y(rows_ * (columns_ + kGap) - kGap, 0xa5);
    args_.y_codes = y.data();
    run(path);
    return {y.begin(), y.end()};
  }
  std::vector<float> floats(Path path) {
    GuardedBuffer<float> y(rows_ * (columns_ + kGap) - kGap, 77.0f);
    args_.y = y.data();
    run(path);
    return {y.begin(), y.end()};
  }

 private:
  void run(Path path) {
    run_on(path, Kernel::scale_sums, [&] {
      scale_sums(args_, 0, rows_ / 3);
      scale_sums(args_, rows_ / 3, rows_);
    });
  }

  static constexpr int64_t kGap = 5;
  int64_t rows_, columns_;
  GuardedBuffer<int32_t> sums_, row_factor_, row_term_;
  GuardedBuffer<float> row_scale_;
  GuardedBuffer<int32_t> column_term_;
  GuardedBuffer<float> column_scale_, bias_;
  ScaleSumsArgs args_;
};

QT_FOR_EACH_PATH(ScaleSums, scale_sums);

TEST_P(ScaleSums, GivesTheReferencesBits) {
  uint64_t seed = 1;
  for (const Variant& variant : kVariants) {
    for (const int64_t columns : {1, 3, 4, 8, 15, 16, 17, 32, 33, 200}) {
      Problem problem(variant, 7, columns, seed++);
      const std::string text = std::string(variant.name) + ", " + std::to_string(columns);
      if (variant.codes) {
        EXPECT_EQ(problem.codes(GetParam()), problem.codes(Path::reference)) << text;
      } else {
        expect_same(problem.floats(GetParam()), problem.floats(Path::reference), text);
      }
    }
  }
}

TEST_P(ScaleSums, AddsTermsExactlyBeforeItRounds) {
  // 2^24 + 1 is no float: the terms must be added as integers.
  const int32_t sums[] = {1 << 24, 5}, factor = 3, term = -2, columns[] = {1, -1};
  const float row_scale = 1.0f, column_scale[] = {1.0f, 0.5f}, bias[] = {0.0f, 0.25f};
  float y[2];
  const ScaleSumsArgs args{.sums = sums,
                           .columns = 2,
                           .row_factor = &factor,
                           .row_term = &term,
                           .row_scale = &row_scale,
                           .column_term = columns,
                           .column_scale = column_scale,
                           .bias = bias,
                           .y = y};
  run_on(GetParam(), Kernel::scale_sums, [&] { scale_sums(args, 0, 1); });
  EXPECT_EQ(y[0], 16777216.0f);  // of 16777217, half to even
  EXPECT_EQ(y[1], 0.25f);
}

}  // namespace
}  // namespace qtoolkit::kernels
