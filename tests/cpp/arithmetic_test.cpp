#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/elementwise.h"
#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(Add, add);
QT_FOR_EACH_PATH(Mul, mul);

struct Output {
  int32_t zero_point, lo, hi;
};
// Unsigned, signed, with ReLU, narrow, and a zero point outside the bounds.
const Output kOutputs[] = {{100, 0, 255}, {-3, -128, 127}, {20, 20, 255}, {0, 0, 15}, {7, 9, 200}};

// Rows of `channels`, which lie `a_gap` and `y_gap` bytes apart; how b is broadcast.
enum class B { whole, one_row, one_code_a_row, one_code };
struct Rows {
  int64_t rows, channels, a_gap = 0, y_gap = 0;
  B b = B::whole;
};
const Rows kRows[] = {
    {0, 5},
    {1, 0},
    {1, 1},
    {17, 1},
    {1, 63},
    {1, 64},
    {1, 65},
    {1, 1000},
    {5, 31, 2, 0},
    {3, 130, 1, 3},
    {4, 0, 0, 0, B::one_row},
    {1, 70, 0, 0, B::one_row},
    {130, 1, 0, 0, B::one_row},
    {100, 3, 0, 0, B::one_row},
    {37, 16, 0, 0, B::one_row},
    {35, 72, 0, 0, B::one_row},
    {5, 72, 0, 0, B::one_row},
    {66, 65, 0, 0, B::one_row},
    {70, 128, 0, 0, B::one_row},
    {40, 96, 8, 0, B::one_row},
    {33, 24, 0, 40, B::one_row},
    {9, 49, 0, 0, B::one_code_a_row},
    {3, 64, 5, 0, B::one_code_a_row},
    {7, 33, 0, 0, B::one_code},
    {7, 80, 1, 2, B::one_code},
};

// Halves give exact ties; the large ones overflow to infinities of both signs, and so to NaN.
const float kMultipliers[][2] = {{0.5f, 0.5f},    {0.731f, 0.0042f}, {1.0f, 2.5f},
                                 {3e38f, -3e38f}, {1e-40f, 1e-3f},   {0.0f, 1.5f},
                                 {3e6f, -2e6f},   {INFINITY, 1.0f},  {NAN, 0.5f}};

void set_multipliers(AddArgs& args, const float (&multipliers)[2]) {
  args.a_multiplier = multipliers[0];
  args.b_multiplier = multipliers[1];
}
void set_multipliers(MulArgs& args, const float (&multipliers)[2]) {
  args.multiplier = multipliers[0] * multipliers[1];
}

// Calls check(args, size of y, text) for every kind of arguments; y is the caller's.
template <class Args, class Check>
void for_each_case(Check check) {
  Random random(1);
  for (const Rows& rows : kRows) {
    Args args;
    const bool repeated = rows.b == B::one_row || rows.b == B::one_code;
    args.channels = rows.channels;
    args.a_row_stride = rows.channels + rows.a_gap;
    args.y_row_stride = rows.channels + rows.y_gap;
    args.b_single = rows.b == B::one_code || rows.b == B::one_code_a_row;
    args.b_row_stride = repeated ? 0 : args.b_single ? 1 : rows.channels;
    const int64_t b_rows = repeated ? 1 : rows.rows;
    const int64_t b_length = args.b_single ? 1 : rows.channels;
    // Both end where memory does.
    qtoolkit::testing::GuardedBuffer<uint8_t> a(rows.rows * args.a_row_stride);
    qtoolkit::testing::GuardedBuffer<uint8_t> b(b_rows * b_length);
    for (uint8_t& code : a) code = static_cast<uint8_t>(random.bits());
    for (uint8_t& code : b) code = static_cast<uint8_t>(random.bits());
    args.a = a.data();
    args.b = b.data();
    for (const Output& output : kOutputs) {
      for (int signs = 0; signs < 4; ++signs) {
        args.a_signed = (signs & 1) != 0;
        args.b_signed = (signs & 2) != 0;
        args.a_zero_point = static_cast<int32_t>(random.integer(0, 127)) - (args.a_signed ? 64 : 0);
        args.b_zero_point = static_cast<int32_t>(random.integer(0, 127)) - (args.b_signed ? 64 : 0);
        args.zero_point = output.zero_point;
        args.lo = output.lo;
        args.hi = output.hi;
        for (const auto& multipliers : kMultipliers) {
          set_multipliers(args, multipliers);
          check(args, rows,
                std::to_string(rows.rows) + " rows of " + std::to_string(rows.channels) +
                    ", multipliers " + std::to_string(multipliers[0]) + " and " +
                    std::to_string(multipliers[1]) + ", signs " + std::to_string(signs) +
                    ", zero point " + std::to_string(output.zero_point));
        }
      }
    }
  }
}

template <class Args>
void give_the_references_bits(Path path, Kernel kernel,
                              void (*call)(const Args&, int64_t, int64_t)) {
  for_each_case<Args>([&](Args args, const Rows& rows, const std::string& text) {
    const int64_t cuts[][2] = {{0, rows.rows}, {rows.rows / 3, rows.rows - rows.rows / 5}};
    for (const auto& cut : cuts) {
      Guarded<uint8_t> expected(rows.rows * args.y_row_stride, 1);
      Guarded<uint8_t> actual(rows.rows * args.y_row_stride, 1);
      args.y = expected.data();
      run_on(Path::reference, kernel, [&] { call(args, cut[0], cut[1]); });
      args.y = actual.data();
      run_on(path, kernel, [&] { call(args, cut[0], cut[1]); });
      ASSERT_EQ(actual.bytes(), expected.bytes()) << text;
    }
  });
}

TEST_P(Add, GivesTheReferencesBits) { give_the_references_bits(GetParam(), Kernel::add, add); }
TEST_P(Mul, GivesTheReferencesBits) { give_the_references_bits(GetParam(), Kernel::mul, mul); }

TEST_P(Mul, GivesTheReferencesBitsForEveryPairOfCodes) {
  std::vector<uint8_t> a(65536), b(65536), expected(65536), actual(65536);
  for (int i = 0; i < 65536; ++i)
    a[i] = static_cast<uint8_t>(i), b[i] = static_cast<uint8_t>(i >> 8);
  for (float multiplier : {0.0039f, 0.5f, 4096.0f, 33000.0f, -0.01f}) {
    MulArgs args{.a = a.data(),
                 .b = b.data(),
                 .a_zero_point = 255,
                 .b_zero_point = 37,
                 .multiplier = multiplier,
                 .zero_point = 100};
    args.y = expected.data();
    run_on(Path::reference, Kernel::mul, [&] { mul(args, 0, 65536); });
    args.y = actual.data();
    run_on(GetParam(), Kernel::mul, [&] { mul(args, 0, 65536); });
    EXPECT_EQ(actual, expected) << multiplier;
  }
}

int64_t value_of(uint8_t code, bool is_signed, int32_t zero_point) {
  return (is_signed ? static_cast<int8_t>(code) : code) - zero_point;
}

// The rounding rule in wide arithmetic; value is rounded to float32 already.
uint8_t code_by_rule(float value, int32_t zero_point, int32_t lo, int32_t hi) {
  const double rounded = std::isnan(value) ? 0.0 : std::nearbyint(static_cast<double>(value));
  return static_cast<uint8_t>(
      static_cast<int64_t>(std::clamp<double>(rounded + zero_point, lo, hi)));
}

// A product of float32 values is exact in double before it is rounded to float32.
float rounded_product(int64_t value, float multiplier) {
  return static_cast<float>(static_cast<double>(value) * multiplier);
}
float by_rule(const AddArgs& args, int64_t a, int64_t b) {
  return rounded_product(a, args.a_multiplier) + rounded_product(b, args.b_multiplier);
}
float by_rule(const MulArgs& args, int64_t a, int64_t b) {
  return rounded_product(a * b, args.multiplier);
}

template <class Args>
void follow_the_rule(Kernel kernel, void (*call)(const Args&, int64_t, int64_t)) {
  for_each_case<Args>([&](Args args, const Rows& rows, const std::string& text) {
    std::vector<uint8_t> y(static_cast<size_t>(rows.rows * args.y_row_stride), 0xA5);
    std::vector<uint8_t> expected = y;
    args.y = y.data();
    run_on(Path::reference, kernel, [&] { call(args, 0, rows.rows); });
    for (int64_t row = 0; row < rows.rows; ++row) {
      for (int64_t c = 0; c < rows.channels; ++c) {
        const uint8_t a = args.a[row * args.a_row_stride + c];
        const uint8_t b = args.b[row * args.b_row_stride + (args.b_single ? 0 : c)];
        const float value = by_rule(args, value_of(a, args.a_signed, args.a_zero_point),
                                    value_of(b, args.b_signed, args.b_zero_point));
        expected[row * args.y_row_stride + c] =
            code_by_rule(value, args.zero_point, args.lo, args.hi);
      }
    }
    ASSERT_EQ(y, expected) << text;
  });
}

TEST(AddReference, FollowsTheRule) { follow_the_rule(Kernel::add, add); }
TEST(MulReference, FollowsTheRule) { follow_the_rule(Kernel::mul, mul); }

TEST_P(Add, HandComputedValues) {
  const std::vector<uint8_t> a = {10, 20, 30, 255, 0}, b = {5, 0, 251, 127, 128};
  std::vector<uint8_t> y(5);
  const AddArgs args{.a = a.data(),
                     .b = b.data(),
                     .y = y.data(),
                     .b_signed = true,
                     .a_zero_point = 10,
                     .a_multiplier = 0.5f,
                     .b_multiplier = 1.0f,
                     .zero_point = 3,
                     .lo = 3,
                     .hi = 200};  // ReLU
  run_on(GetParam(), Kernel::add, [&] { add(args, 0, 5); });
  // 0 + 5; 5 + 0; 10 - 5; 122.5 + 127 = 249.5; -5 - 128
  EXPECT_EQ(y, (std::vector<uint8_t>{8, 8, 8, 200, 3}));
}

TEST_P(Mul, HandComputedValuesOfAGate) {
  const std::vector<uint8_t> a = {10, 20, 30, 13, 0, 255}, b = {2, 254, 128};
  std::vector<uint8_t> y(6);
  const MulArgs args{.a = a.data(),
                     .b = b.data(),
                     .y = y.data(),
                     .channels = 3,
                     .a_row_stride = 3,
                     .b_row_stride = 0,
                     .y_row_stride = 3,
                     .b_signed = true,
                     .a_zero_point = 10,
                     .b_zero_point = -2,
                     .multiplier = 0.125f,
                     .zero_point = 50,
                     .lo = 0,
                     .hi = 70};
  run_on(GetParam(), Kernel::mul, [&] { mul(args, 0, 2); });
  // 0 * 4; 10 * 0; 20 * -126; 3 * 4 / 8 = 1.5; -10 * 0; 245 * -126
  EXPECT_EQ(y, (std::vector<uint8_t>{50, 50, 0, 52, 50, 0}));
}

TEST_P(Mul, WorksInPlace) {
  Random random(3);
  const std::vector<uint8_t> a = random.codes(72 * 40), b = random.codes(72);
  std::vector<uint8_t> y(a.size()), in_place = a;
  MulArgs args{.a = a.data(),
               .b = b.data(),
               .y = y.data(),
               .channels = 72,
               .a_row_stride = 72,
               .b_row_stride = 0,
               .y_row_stride = 72,
               .a_zero_point = 5,
               .b_zero_point = 9,
               .multiplier = 0.01f,
               .zero_point = 30};
  run_on(GetParam(), Kernel::mul, [&] { mul(args, 0, 40); });
  args.a = args.y = in_place.data();
  run_on(GetParam(), Kernel::mul, [&] { mul(args, 0, 40); });
  EXPECT_EQ(in_place, y);
}

}  // namespace
}  // namespace qtoolkit::kernels
