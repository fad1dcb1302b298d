#include "kernels/quantize_image.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

using testing::GuardedBuffer;

QT_FOR_EACH_PATH(QuantizeImage, quantize_image);
QT_FOR_EACH_PATH(DequantizeImage, dequantize_image);

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t batch, height, width, channels;
};
// Widths around every block of pixels, in all channel counts that have loops of their own.
const Shape kShapes[] = {
    {1, 1, 1, 1},  {2, 3, 15, 1},  {1, 2, 64, 1},  {1, 2, 65, 1}, {1, 2, 130, 1}, {1, 1, 1, 2},
    {2, 2, 31, 2}, {1, 2, 32, 2},  {1, 3, 97, 2},  {1, 1, 1, 3},  {2, 2, 7, 3},   {3, 2, 16, 3},
    {1, 2, 17, 3}, {1, 3, 224, 3}, {1, 2, 131, 3}, {1, 1, 1, 4},  {2, 2, 15, 4},  {1, 2, 16, 4},
    {1, 2, 33, 4}, {1, 2, 3, 5},   {2, 2, 130, 5}, {1, 2, 9, 21}, {1, 2, 1, 64},  {1, 1, 5, 67}};

// Where element (n, c, i, j) lies.
struct Strides {
  int64_t image, channel, row, column;
  int64_t at(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return n * image + c * channel + i * row + j * column;
  }
};

int64_t size_of(const Shape& s, const Strides& strides) {
  return strides.at(s.batch - 1, s.channels - 1, s.height - 1, s.width - 1) + 1;
}

Strides nhwc(const Shape& s, int64_t gap, int64_t border) {
  const int64_t pixel = s.channels + gap, row = (s.width + border) * pixel;
  return {(s.height + border) * row, 1, row, pixel};
}

// Dense NCHW and NHWC; cut out of larger ones; every second column of NCHW; columns before rows.
std::vector<Strides> float_layouts(const Shape& s) {
  const int64_t plane = s.height * s.width, wide = (s.height + 3) * (s.width + 5);
  return {{s.channels * plane, plane, s.width, 1},
          {s.channels * wide, wide, s.width + 5, 1},
          nhwc(s, 0, 0),
          nhwc(s, 0, 2),
          nhwc(s, 3, 0),
          {2 * s.channels * plane, 2 * plane, 2 * s.width, 2},
          {s.channels * plane, plane, 1, s.height}};
}
// Dense, with a border, and with bytes between pixels.
std::vector<Strides> code_layouts(const Shape& s) {
  return {nhwc(s, 0, 0), nhwc(s, 0, 2), nhwc(s, 1, 1)};
}

struct Rule {
  float scale;
  int32_t zero_point, quant_min, quant_max;
};
const Rule kRules[] = {{0.25f, 128, 0, 255},   {0.0371f, -7, -128, 127}, {1.0f, 0, 0, 255},
                       {3.3f, 255, 0, 255},    {0.5f, 5, 0, 15},         {1e-40f, 100, 0, 255},
                       {0.7f, -128, -128, 127}};

GuardedBuffer<float> awkward_values(int64_t size, float scale, Random& random) {
  const float specials[] = {kNaN,    -kNaN,    kInfinity,    -kInfinity,    FLT_MAX, -FLT_MAX,
                            FLT_MIN, -FLT_MIN, FLT_TRUE_MIN, -FLT_TRUE_MIN, 0.0f,    -0.0f,
                            1e10f,   -1e10f,   2.1474836e9f, -2.1474836e9f};
  GuardedBuffer<float> values(size);
  for (float& value : values) {
    switch (random.integer(0, 3)) {
      case 0:
        value = specials[random.integer(0, 15)];
        break;
      case 1:
        value = (static_cast<float>(random.integer(-300, 300)) + 0.5f) * scale;
        break;
      default:
        value = random.real(-300.0f, 300.0f) * scale;
    }
  }
  return values;
}

std::string text(const Shape& s, size_t from, size_t to, const Rule& rule) {
  return std::to_string(s.batch) + "x" + std::to_string(s.height) + "x" + std::to_string(s.width) +
         "x" + std::to_string(s.channels) + ", layouts " + std::to_string(from) + " to " +
         std::to_string(to) + ", scale " + std::to_string(rule.scale);
}

// All rows, and a part that begins and ends within images.
std::vector<std::pair<int64_t, int64_t>> row_ranges(const Shape& s) {
  const int64_t rows = s.batch * s.height;
  return {{0, rows}, {rows / 3, rows - rows / 4}, {rows / 2, rows / 2}};
}

// Calls check(args, codes in the output, text) for every problem.
template <class Check>
void for_each_quantization(Check check) {
  Random random(1);
  for (const Shape& s : kShapes) {
    const std::vector<Strides> from = float_layouts(s), to = code_layouts(s);
    for (size_t x = 0; x < from.size(); ++x) {
      for (size_t y = 0; y < to.size(); ++y) {
        const Rule& rule = kRules[random.integer(0, std::size(kRules) - 1)];
        const GuardedBuffer<float> values = awkward_values(size_of(s, from[x]), rule.scale, random);
        const QuantizeImageArgs args = {.x = values.data(),
                                        .height = s.height,
                                        .width = s.width,
                                        .channels = s.channels,
                                        .x_image_stride = from[x].image,
                                        .x_channel_stride = from[x].channel,
                                        .x_row_stride = from[x].row,
                                        .x_column_stride = from[x].column,
                                        .y_image_stride = to[y].image,
                                        .y_row_stride = to[y].row,
                                        .y_pixel_stride = to[y].column,
                                        .scale = rule.scale,
                                        .zero_point = rule.zero_point,
                                        .quant_min = rule.quant_min,
                                        .quant_max = rule.quant_max};
        check(args, s, from[x], to[y], text(s, x, y, rule));
      }
    }
  }
}

template <class Check>
void for_each_dequantization(Check check) {
  Random random(2);
  for (const Shape& s : kShapes) {
    const std::vector<Strides> from = code_layouts(s), to = float_layouts(s);
    for (size_t x = 0; x < from.size(); ++x) {
      for (size_t y = 0; y < to.size(); ++y) {
        const Rule& rule = kRules[random.integer(0, std::size(kRules) - 1)];
        GuardedBuffer<uint8_t> codes(size_of(s, from[x]));
        for (uint8_t& code : codes) code = static_cast<uint8_t>(random.bits());
        const DequantizeImageArgs args = {.x = codes.data(),
                                          .is_signed = rule.quant_min < 0,
                                          .height = s.height,
                                          .width = s.width,
                                          .channels = s.channels,
                                          .x_image_stride = from[x].image,
                                          .x_row_stride = from[x].row,
                                          .x_pixel_stride = from[x].column,
                                          .y_image_stride = to[y].image,
                                          .y_channel_stride = to[y].channel,
                                          .y_row_stride = to[y].row,
                                          .y_column_stride = to[y].column,
                                          .scale = rule.scale,
                                          .zero_point = rule.zero_point};
        check(args, s, from[x], to[y], text(s, x, y, rule));
      }
    }
  }
}

// All bytes of the output, those between rows and pixels too.
template <class Element, class Function, class Args>
std::vector<uint8_t> output(Path path, Kernel kernel, Function* function, Args args, int64_t size,
                            int64_t begin, int64_t end) {
  Guarded<Element> y(size, 1);
  args.y = y.data();
  run_on(path, kernel, [&] { function(args, begin, end); });
  return y.bytes();
}

TEST_P(QuantizeImage, GivesTheReferencesBits) {
  for_each_quantization([&](const QuantizeImageArgs& args, const Shape& s, const Strides&,
                            const Strides& to, const std::string& text) {
    for (const auto& [begin, end] : row_ranges(s)) {
      const auto run = [&, begin = begin, end = end](Path path) {
        return output<uint8_t>(path, Kernel::quantize_image, quantize_image, args, size_of(s, to),
                               begin, end);
      };
      EXPECT_EQ(run(GetParam()), run(Path::reference))
          << text << ", rows " << begin << " to " << end;
    }
  });
}

TEST_P(DequantizeImage, GivesTheReferencesBits) {
  for_each_dequantization([&](const DequantizeImageArgs& args, const Shape& s, const Strides&,
                              const Strides& to, const std::string& text) {
    for (const auto& [begin, end] : row_ranges(s)) {
      const auto run = [&, begin = begin, end = end](Path path) {
        return output<float>(path, Kernel::dequantize_image, dequantize_image, args, size_of(s, to),
                             begin, end);
      };
      EXPECT_EQ(run(GetParam()), run(Path::reference))
          << text << ", rows " << begin << " to " << end;
    }
  });
}

template <class Visit>
void for_each_element(const Shape& s, Visit visit) {
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t i = 0; i < s.height; ++i) {
        for (int64_t j = 0; j < s.width; ++j) visit(n, c, i, j);
      }
    }
  }
}

// The rule in wide arithmetic: only the product is rounded to float32.
TEST(QuantizeImageReference, FollowsTheRule) {
  for_each_quantization([&](QuantizeImageArgs args, const Shape& s, const Strides& from,
                            const Strides& to, const std::string& text) {
    std::vector<uint8_t> y(size_of(s, to));
    args.y = y.data();
    run_on(Path::reference, Kernel::quantize_image,
           [&] { quantize_image(args, 0, s.batch * s.height); });
    for_each_element(s, [&](int64_t n, int64_t c, int64_t i, int64_t j) {
      const float product = args.x[from.at(n, c, i, j)] * (1.0f / args.scale);
      const double rounded = std::isnan(product) ? 0.0 : std::nearbyint(double{product});
      const double code =
          std::clamp<double>(rounded + args.zero_point, args.quant_min, args.quant_max);
      ASSERT_EQ(y[to.at(n, c, i, j)], static_cast<uint8_t>(static_cast<int32_t>(code)))
          << text << " at " << n << ", " << c << ", " << i << ", " << j;
    });
  });
}

TEST(DequantizeImageReference, FollowsTheRule) {
  for_each_dequantization([&](DequantizeImageArgs args, const Shape& s, const Strides& from,
                              const Strides& to, const std::string& text) {
    std::vector<float> y(size_of(s, to));
    args.y = y.data();
    run_on(Path::reference, Kernel::dequantize_image,
           [&] { dequantize_image(args, 0, s.batch * s.height); });
    for_each_element(s, [&](int64_t n, int64_t c, int64_t i, int64_t j) {
      const int32_t byte = args.x[from.at(n, c, i, j)];
      const int32_t code = args.is_signed && byte > 127 ? byte - 256 : byte;
      ASSERT_EQ(y[to.at(n, c, i, j)], static_cast<float>(code - args.zero_point) * args.scale)
          << text << " at " << n << ", " << c << ", " << i << ", " << j;
    });
  });
}

}  // namespace
}  // namespace qtoolkit::kernels
