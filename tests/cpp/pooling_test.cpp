#include "kernels/pooling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "guarded_buffer.h"
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
const Case kCases[] = {{1, 1, {1, 1, 1, 0, 1}, {1, 1, 1, 0, 1}},
                       {2, 3, {7, 3, 2, 1, 1}, {9, 3, 2, 1, 1}},
                       {1, 4, {5, 2, 2, 0, 1}, {6, 3, 1, 1, 1}},
                       {1, 15, {6, 2, 1, 0, 1}, {5, 2, 1, 1, 1}},
                       {1, 16, {7, 7, 1, 0, 1}, {7, 7, 1, 0, 1}},
                       {2, 17, {9, 3, 1, 1, 2}, {8, 2, 2, 1, 3}},
                       {1, 24, {5, 3, 2, 1, 1}, {5, 3, 2, 1, 1}},
                       {1, 63, {4, 2, 2, 0, 1}, {4, 2, 2, 0, 1}},
                       {3, 64, {5, 3, 2, 1, 1}, {6, 3, 2, 1, 1}},
                       {1, 65, {3, 3, 1, 1, 1}, {3, 3, 1, 1, 1}},
                       {1, 200, {4, 3, 1, 1, 1}, {4, 3, 1, 0, 1}},
                       {1, 20, {2, 2, 1, 0, 1}, {600, 600, 1, 0, 1}}};  // sums past 16 bits

std::string text(const Case& c, int options) {
  return std::to_string(c.batch) + "x" + std::to_string(c.rows.size) + "x" +
         std::to_string(c.columns.size) + "x" + std::to_string(c.channels) + ", options " +
         std::to_string(options);
}

// Where images lie in memory: each with `border` pixels around it.
struct Layout {
  Layout(int64_t height, int64_t width, int64_t channels, int64_t border)
      : row_stride((width + 2 * border) * channels),
        image_stride((height + 2 * border) * row_stride),
        first(border * (row_stride + channels)),
        inside((height - 1) * row_stride + width * channels) {}
  // To the last byte inside the last border.
  int64_t size(int64_t images) const { return first + (images - 1) * image_stride + inside; }

  int64_t row_stride, image_stride;
  int64_t first, inside;  // of an image: offset of its first byte, and bytes from there to its last
};

// Images of random codes, with a page that cannot be touched after the last.
struct Input {
  Input(const Case& c, int64_t border, Random& random)
      : layout(c.rows.size, c.columns.size, c.channels, border), codes(layout.size(c.batch)) {
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.bits());
  }
  const uint8_t* first() const { return codes.data() + layout.first; }

  Layout layout;
  testing::GuardedBuffer<uint8_t> codes;
};

template <class Args>
Layout output_layout(const Args& args, int64_t border) {
  return {args.out_height, args.out_width, args.channels, border};
}

template <class Args>
void set_output(Args& args, const Layout& layout, uint8_t* y) {
  args.y = y + layout.first;
  args.y_row_stride = layout.row_stride;
  args.y_image_stride = layout.image_stride;
}

template <class Args>
Args args_of(const Case& c, const Windows& rows, const Windows& columns, const Input& x) {
  Args args;
  args.x = x.first();
  args.x_row_stride = x.layout.row_stride;
  args.x_image_stride = x.layout.image_stride;
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
std::vector<uint8_t> output(Path path, Kernel kernel, Function* function, Args args,
                            const Layout& layout, int64_t batch, int64_t begin, int64_t end) {
  Guarded<uint8_t> y(layout.size(batch), 1);
  set_output(args, layout, y.data());
  run_on(path, kernel, [&] { function(args, begin, end); });
  return y.bytes();
}

// Fails where the path's bytes differ from the reference's, on all rows and on some, with and
// without a border around the output (which then is compared too).
template <class Function, class Args>
void expect_reference_bits(Path path, Kernel kernel, Function* function, const Args& args,
                           int64_t batch, const std::string& text) {
  const int64_t rows = batch * args.out_height;
  const int64_t cuts[][2] = {{0, rows}, {rows / 3, rows - rows / 5}, {rows / 2, rows / 2}};
  for (int64_t border : {0, 2}) {
    const Layout layout = output_layout(args, border);
    for (const auto& [begin, end] : cuts) {
      EXPECT_EQ(output(path, kernel, function, args, layout, batch, begin, end),
                output(Path::reference, kernel, function, args, layout, batch, begin, end))
          << text << ", border " << border;
    }
  }
}

template <class Check>
void for_each_max_pool(Check check) {
  Random random(1);
  for (const Case& c : kCases) {
    const Windows rows(c.rows), columns(c.columns);
    for (int options = 0; options < 4; ++options) {
      const Input x(c, options / 2, random);
      auto args = args_of<MaxPool2dArgs>(c, rows, columns, x);
      args.is_signed = options % 2 != 0;
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
    for (const Output& output : outputs) {
      for (int options = 0; options < 4; ++options) {
        const Input x(c, options / 2, random);
        auto args = args_of<AvgPool2dArgs>(c, rows, columns, x);
        args.x_signed = options % 2 != 0;
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
      if (h < 0 || h >= c.rows.size || w < 0 || w >= c.columns.size) continue;
      const uint8_t code =
          args.x[n * args.x_image_stride + h * args.x_row_stride + w * c.channels + channel];
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
    const Layout layout = output_layout(args, 0);
    std::vector<uint8_t> y(layout.size(c.batch));
    set_output(args, layout, y.data());
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
    const Layout layout = output_layout(args, 0);
    std::vector<uint8_t> y(layout.size(c.batch));
    set_output(args, layout, y.data());
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

// A row of four codes in windows of two.
const Case kRowOfFour = {1, 1, {1, 1, 1, 0, 1}, {4, 2, 2, 0, 1}};

TEST_P(MaxPool2d, ComparesSignedCodesAsSigned) {
  const std::vector<uint8_t> x = {0x80, 0x01, 0x7F, 0xFF};  // -128, 1, 127, -1 or 128, 1, 127, 255
  const Windows rows(kRowOfFour.rows), columns(kRowOfFour.columns);
  Random random(3);
  Input input(kRowOfFour, 0, random);
  std::copy(x.begin(), x.end(), input.codes.begin());
  auto args = args_of<MaxPool2dArgs>(kRowOfFour, rows, columns, input);
  std::vector<uint8_t> y(2);
  set_output(args, output_layout(args, 0), y.data());
  run_on(GetParam(), Kernel::max_pool2d, [&] { max_pool2d(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{0x80, 0xFF}));
  args.is_signed = true;
  run_on(GetParam(), Kernel::max_pool2d, [&] { max_pool2d(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{0x01, 0x7F}));
}

TEST_P(AvgPool2d, HandComputedValues) {
  const std::vector<uint8_t> x = {10, 13, 14, 255};
  const Windows rows(kRowOfFour.rows), columns(kRowOfFour.columns);
  Random random(4);
  Input input(kRowOfFour, 0, random);
  std::copy(x.begin(), x.end(), input.codes.begin());
  auto args = args_of<AvgPool2dArgs>(kRowOfFour, rows, columns, input);
  args.row_divisor = rows.divisor.data();
  args.column_divisor = columns.divisor.data();
  args.x_zero_point = 10;
  args.zero_point = 1;
  args.hi = 100;
  std::vector<uint8_t> y(2);
  set_output(args, output_layout(args, 0), y.data());
  run_on(GetParam(), Kernel::avg_pool2d, [&] { avg_pool2d(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{3, 100}));  // (0 + 3) / 2 = 1.5, to even 2; (4 + 245) / 2
}

}  // namespace
}  // namespace qtoolkit::kernels
