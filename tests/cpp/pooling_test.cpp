#include "kernels/pooling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(MaxPool2d, max_pool2d);
QT_FOR_EACH_PATH(AvgPool2d, avg_pool2d);

struct Axis {
  int64_t size, kernel, stride, padding, dilation;
};

// The windows along one axis, cut to the input.
struct Windows {
  explicit Windows(const Axis& axis) : step(axis.dilation) {
    const int64_t extent = (axis.kernel - 1) * axis.dilation + 1;
    for (int64_t first = -axis.padding; first + extent <= axis.size + axis.padding;
         first += axis.stride) {
      int64_t inside = first;
      while (inside < 0) inside += axis.dilation;
      begin.push_back(inside);
      end.push_back(std::min(first + extent, axis.size));
      divisor.push_back(axis.kernel);
    }
  }
  int64_t count() const { return static_cast<int64_t>(begin.size()); }
  std::vector<int64_t> begin, end, divisor;
  int64_t step;
};

struct Case {
  int64_t batch, channels;
  Axis rows, columns;
};
// size, kernel, stride, padding, dilation
const Case kCases[] = {
    {1, 1, {1, 1, 1, 0, 1}, {1, 1, 1, 0, 1}},  {2, 3, {7, 3, 2, 1, 1}, {9, 3, 2, 1, 1}},
    {1, 4, {5, 2, 2, 0, 1}, {6, 3, 1, 1, 1}},  {1, 15, {6, 2, 1, 0, 1}, {5, 2, 1, 1, 1}},
    {1, 16, {7, 7, 1, 0, 1}, {7, 7, 1, 0, 1}}, {2, 17, {9, 3, 1, 1, 2}, {8, 2, 2, 1, 3}},
    {1, 24, {5, 3, 2, 1, 1}, {5, 3, 2, 1, 1}}, {1, 63, {4, 2, 2, 0, 1}, {4, 2, 2, 0, 1}},
    {3, 64, {5, 3, 2, 1, 1}, {6, 3, 2, 1, 1}}, {1, 65, {3, 3, 1, 1, 1}, {3, 3, 1, 1, 1}},
    {1, 200, {4, 3, 1, 1, 1}, {4, 3, 1, 0, 1}}};

std::string text(const Case& c, int options) {
  return std::to_string(c.batch) + "x" + std::to_string(c.rows.size) + "x" +
         std::to_string(c.columns.size) + "x" + std::to_string(c.channels) + ", options " +
         std::to_string(options);
}

template <class Args>
Args args_of(const Case& c, const Windows& rows, const Windows& columns,
             const std::vector<uint8_t>& x) {
  Args args;
  args.x = x.data();
  args.height = c.rows.size;
  args.width = c.columns.size;
  args.channels = c.channels;
  args.out_height = rows.count();
  args.out_width = columns.count();
  args.row_begin = rows.begin.data();
  args.row_end = rows.end.data();
  args.column_begin = columns.begin.data();
  args.column_end = columns.end.data();
  return args;
}

template <class Function, class Args>
std::vector<uint8_t> output(Path path, Kernel kernel, Function* function, Args args, int64_t size,
                            int64_t begin, int64_t end) {
  Guarded<uint8_t> y(size, 1);
  args.y = y.data();
  run_on(path, kernel, [&] { function(args, begin, end); });
  return y.bytes();
}

// Fails where the path's bytes differ from the reference's, on all rows and on some.
template <class Function, class Args>
void expect_reference_bits(Path path, Kernel kernel, Function* function, const Args& args,
                           int64_t batch, const std::string& text) {
  const int64_t rows = batch * args.out_height;
  const int64_t size = rows * args.out_width * args.channels;
  const int64_t cuts[][2] = {{0, rows}, {rows / 3, rows - rows / 5}, {rows / 2, rows / 2}};
  for (const auto& cut : cuts) {
    EXPECT_EQ(output(path, kernel, function, args, size, cut[0], cut[1]),
              output(Path::reference, kernel, function, args, size, cut[0], cut[1]))
        << text;
  }
}

template <class Check>
void for_each_max_pool(Check check) {
  Random random(1);
  for (const Case& c : kCases) {
    const Windows rows(c.rows), columns(c.columns);
    const std::vector<uint8_t> x =
        random.codes(c.batch * c.rows.size * c.columns.size * c.channels);
    for (int options = 0; options < 2; ++options) {
      auto args = args_of<MaxPool2dArgs>(c, rows, columns, x);
      args.is_signed = options != 0;
      args.row_step = rows.step;
      args.column_step = columns.step;
      check(args, c, text(c, options));
    }
  }
}

template <class Check>
void for_each_avg_pool(Check check) {
  struct Output {
    double multiplier;
    int32_t x_zero_point, zero_point, lo, hi;
  };
  const Output outputs[] = {{1.0, 0, 0, 0, 255},
                            {0.5, 128, 100, 0, 255},
                            {1.37, -3, 5, -128, 127},
                            {90.0, 60, 128, 0, 255},
                            {1e300, 60, 8, 0, 255}};
  Random random(2);
  for (Case c : kCases) {
    c.rows.dilation = c.columns.dilation = 1;
    const Windows rows(c.rows), columns(c.columns);
    const std::vector<uint8_t> x =
        random.codes(c.batch * c.rows.size * c.columns.size * c.channels);
    for (const Output& output : outputs) {
      for (int options = 0; options < 2; ++options) {
        auto args = args_of<AvgPool2dArgs>(c, rows, columns, x);
        args.x_signed = options != 0;
        args.row_divisor = rows.divisor.data();
        args.column_divisor = columns.divisor.data();
        args.multiplier = output.multiplier;
        args.x_zero_point = output.x_zero_point;
        args.zero_point = output.zero_point;
        args.lo = output.lo;
        args.hi = output.hi;
        check(args, c, text(c, options));
      }
    }
  }
}

TEST_P(MaxPool2d, GivesTheReferencesBits) {
  for_each_max_pool([&](const MaxPool2dArgs& args, const Case& c, const std::string& text) {
    expect_reference_bits(GetParam(), Kernel::max_pool2d, max_pool2d, args, c.batch, text);
  });
}

TEST_P(AvgPool2d, GivesTheReferencesBits) {
  for_each_avg_pool([&](const AvgPool2dArgs& args, const Case& c, const std::string& text) {
    expect_reference_bits(GetParam(), Kernel::avg_pool2d, avg_pool2d, args, c.batch, text);
  });
}

// The values under output pixel (n, i, j)'s window on a padded input, by coordinates.
template <class Args>
std::vector<int64_t> window(const Args& args, const Case& c, bool is_signed, int64_t n, int64_t i,
                            int64_t j, int64_t channel) {
  std::vector<int64_t> values;
  for (int64_t a = 0; a < c.rows.kernel; ++a) {
    for (int64_t b = 0; b < c.columns.kernel; ++b) {
      const int64_t h = i * c.rows.stride - c.rows.padding + a * c.rows.dilation;
      const int64_t w = j * c.columns.stride - c.columns.padding + b * c.columns.dilation;
      if (h < 0 || h >= args.height || w < 0 || w >= args.width) continue;
      const uint8_t code = args.x[((n * args.height + h) * args.width + w) * c.channels + channel];
      values.push_back(is_signed ? static_cast<int8_t>(code) : code);
    }
  }
  return values;
}

template <class Args, class Expected>
void expect_everywhere(const Args& args, const Case& c, const std::vector<uint8_t>& y,
                       bool is_signed, Expected expected, const std::string& text) {
  size_t at = 0;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t i = 0; i < args.out_height; ++i) {
      for (int64_t j = 0; j < args.out_width; ++j) {
        for (int64_t channel = 0; channel < c.channels; ++channel) {
          ASSERT_EQ(y[at++], expected(window(args, c, is_signed, n, i, j, channel)))
              << text << " at " << n << ", " << i << ", " << j << ", " << channel;
        }
      }
    }
  }
}

TEST(MaxPool2dReference, IsTheMaximumOfTheWindow) {
  for_each_max_pool([&](MaxPool2dArgs args, const Case& c, const std::string& text) {
    std::vector<uint8_t> y(c.batch * args.out_height * args.out_width * c.channels);
    args.y = y.data();
    run_on(Path::reference, Kernel::max_pool2d,
           [&] { max_pool2d(args, 0, c.batch * args.out_height); });
    const auto largest = [](const std::vector<int64_t>& values) {
      return static_cast<uint8_t>(*std::max_element(values.begin(), values.end()));
    };
    expect_everywhere(args, c, y, args.is_signed, largest, text);
  });
}

TEST(AvgPool2dReference, IsTheRoundedMeanOfTheWindow) {
  for_each_avg_pool([&](AvgPool2dArgs args, Case c, const std::string& text) {
    c.rows.dilation = c.columns.dilation = 1;
    std::vector<uint8_t> y(c.batch * args.out_height * args.out_width * c.channels);
    args.y = y.data();
    run_on(Path::reference, Kernel::avg_pool2d,
           [&] { avg_pool2d(args, 0, c.batch * args.out_height); });
    const double divisor = static_cast<double>(c.rows.kernel * c.columns.kernel);
    const float multiplier = static_cast<float>(args.multiplier / divisor);
    const auto mean = [&](const std::vector<int64_t>& values) {
      int64_t sum = 0;
      for (int64_t value : values) sum += value - args.x_zero_point;
      const float scaled = static_cast<float>(sum) * multiplier;
      const double rounded = std::isnan(scaled) ? 0.0 : std::nearbyint(double{scaled});
      return static_cast<uint8_t>(
          static_cast<int64_t>(std::clamp<double>(rounded + args.zero_point, args.lo, args.hi)));
    };
    expect_everywhere(args, c, y, args.x_signed, mean, text);
  });
}

TEST_P(MaxPool2d, ComparesSignedCodesAsSigned) {
  const std::vector<uint8_t> x = {0x80, 0x01, 0x7F, 0xFF};  // -128, 1, 127, -1 or 128, 1, 127, 255
  const Windows rows({1, 1, 1, 0, 1}), columns({4, 2, 2, 0, 1});
  auto args = args_of<MaxPool2dArgs>({1, 1, {1, 1, 1, 0, 1}, {4, 2, 2, 0, 1}}, rows, columns, x);
  std::vector<uint8_t> y(2);
  args.y = y.data();
  run_on(GetParam(), Kernel::max_pool2d, [&] { max_pool2d(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{0x80, 0xFF}));
  args.is_signed = true;
  run_on(GetParam(), Kernel::max_pool2d, [&] { max_pool2d(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{0x01, 0x7F}));
}

TEST_P(AvgPool2d, HandComputedValues) {
  const std::vector<uint8_t> x = {10, 13, 14, 255};
  const Windows rows({1, 1, 1, 0, 1}), columns({4, 2, 2, 0, 1});
  auto args = args_of<AvgPool2dArgs>({1, 1, {1, 1, 1, 0, 1}, {4, 2, 2, 0, 1}}, rows, columns, x);
  args.row_divisor = rows.divisor.data();
  args.column_divisor = columns.divisor.data();
  args.x_zero_point = 10;
  args.zero_point = 1;
  args.hi = 100;
  std::vector<uint8_t> y(2);
  args.y = y.data();
  run_on(GetParam(), Kernel::avg_pool2d, [&] { avg_pool2d(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{3, 100}));  // (0 + 3) / 2 = 1.5, to even 2; (4 + 245) / 2
}

}  // namespace
}  // namespace qtoolkit::kernels
