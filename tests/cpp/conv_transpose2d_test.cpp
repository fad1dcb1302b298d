#include "kernels/conv_transpose2d.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "paths.h"

namespace qtoolkit::kernels {
namespace {

struct Case {
  int64_t in_size;
  TransposedGeometry geometry;
  int64_t output_padding;

  int64_t out_size() const {
    return (in_size - 1) * geometry.stride - 2 * geometry.padding +
           (geometry.kernel - 1) * geometry.dilation + output_padding + 1;
  }
  std::string text() const {
    return "in " + std::to_string(in_size) + ", kernel " + std::to_string(geometry.kernel) +
           ", stride " + std::to_string(geometry.stride) + ", padding " +
           std::to_string(geometry.padding) + ", dilation " + std::to_string(geometry.dilation);
  }
};

template <class Check>
void for_each_case(Check check) {
  for (int64_t in_size : {1, 2, 5}) {
    for (int64_t kernel : {1, 2, 3, 5}) {
      for (int64_t stride : {1, 2, 3, 6}) {
        for (int64_t padding : {0, 1, 4}) {
          for (int64_t dilation : {1, 2, 3, 4}) {
            for (int64_t output_padding : {0, 1}) {
              const Case c{in_size, {kernel, stride, padding, dilation}, output_padding};
              if (c.out_size() > 0) check(c);
            }
          }
        }
      }
    }
  }
}

TEST(TransposedAxes, GiveEveryOutputItsTaps) {
  for_each_case([](const Case& c) {
    const auto& g = c.geometry;
    std::vector<int64_t> x, w;
    for (int64_t i = 0; i < c.in_size; ++i) x.push_back(1 + i * i);
    for (int64_t k = 0; k < g.kernel; ++k) w.push_back(1000 + 7 * k * k);
    std::vector<int64_t> expected(c.out_size(), 0), got(c.out_size(), -1);
    for (int64_t i = 0; i < c.in_size; ++i) {
      for (int64_t k = 0; k < g.kernel; ++k) {
        const int64_t out = i * g.stride - g.padding + k * g.dilation;
        if (out >= 0 && out < c.out_size()) expected[out] += x[i] * w[k];
      }
    }
    const auto axes = transposed_axes(g, c.out_size());
    const Border border = transposed_border(axes, c.in_size);
    for (const TransposedAxis& axis : axes) {
      for (int64_t q = 0; q < axis.outputs; ++q) {
        int64_t sum = 0;
        for (int64_t tap = 0; tap < axis.kernel; ++tap) {
          const int64_t in = axis.first_input + q + tap * axis.dilation;
          ASSERT_GE(in, -border.before) << c.text();
          ASSERT_LT(in, c.in_size + border.after) << c.text();
          if (axis.taps.first < 0 || in < 0 || in >= c.in_size) continue;
          sum += x[in] * w[axis.taps.first - tap * axis.taps.step];
        }
        got[axis.first_output + q * g.stride] = sum;
      }
    }
    EXPECT_EQ(got, expected) << c.text();
  });
}

TEST(TransposedWeight, TakesTheTapsOfEachGroup) {
  const int64_t groups = 2, inputs = 3, outputs = 2, height = 3, width = 4;
  Random random(1);
  const std::vector<uint8_t> bytes = random.codes(groups * inputs * outputs * height * width);
  const auto* weight = reinterpret_cast<const int8_t*>(bytes.data());
  const Conv2dShape part{.groups = groups,
                         .in_channels = inputs,
                         .out_channels = outputs,
                         .kernel_height = 2,
                         .kernel_width = 2};
  const TransposedTaps rows{.first = 2, .step = 2}, columns{.first = 3, .step = 2}, none;
  std::vector<int8_t> result(groups * outputs * inputs * 4);
  transposed_weight(part, rows, columns, height, width, weight, result.data());
  size_t at = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i) {
        for (int64_t row : {2, 0}) {
          for (int64_t column : {3, 1}) {
            const int64_t from = (((g * inputs + i) * outputs + o) * height + row) * width + column;
            EXPECT_EQ(result[at++], weight[from]);
          }
        }
      }
    }
  }
  transposed_weight(part, rows, none, height, width, weight, result.data());
  EXPECT_EQ(result, std::vector<int8_t>(result.size(), 0));
}

}  // namespace
}  // namespace qtoolkit::kernels
