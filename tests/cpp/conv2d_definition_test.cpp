// The reference of the convolution kernels against the definition of a convolution.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <tuple>
#include <vector>

#include "kernels/conv2d.h"
#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

// A convolution written as its definition: NCHW, not padded in memory, in 64-bit integers.
struct Definition {
  int64_t channels = 6, height = 8, width = 9, groups, out_channels = 12;
  int64_t kernel_height = 3, kernel_width = 2, padding = 2;
  int64_t stride_height, stride_width, dilation_height, dilation_width;
  int32_t x_zero_point = 131;
  std::vector<uint8_t> x;      // [channels, height, width]
  std::vector<int8_t> weight;  // [out_channels, channels / groups, kernel_height, kernel_width]
  std::vector<int32_t> bias;

  int64_t out_height() const {
    return (height + 2 * padding - dilation_height * (kernel_height - 1) - 1) / stride_height + 1;
  }
  int64_t out_width() const {
    return (width + 2 * padding - dilation_width * (kernel_width - 1) - 1) / stride_width + 1;
  }
  int64_t accumulator(int64_t channel, int64_t row, int64_t column) const {
    const int64_t per_group = channels / groups;
    const int64_t group = channel / (out_channels / groups);
    int64_t sum = bias[channel];
    for (int64_t i = 0; i < per_group; ++i) {
      for (int64_t ky = 0; ky < kernel_height; ++ky) {
        for (int64_t kx = 0; kx < kernel_width; ++kx) {
          const int64_t in_row = row * stride_height - padding + ky * dilation_height;
          const int64_t in_column = column * stride_width - padding + kx * dilation_width;
          if (in_row < 0 || in_row >= height || in_column < 0 || in_column >= width) continue;
          const int64_t code = x[((group * per_group + i) * height + in_row) * width + in_column];
          sum += (code - x_zero_point) *
                 weight[((channel * per_group + i) * kernel_height + ky) * kernel_width + kx];
        }
      }
    }
    return sum;
  }
};

class Conv2dReference : public ::testing::TestWithParam<std::tuple<int, int, int>> {};

TEST_P(Conv2dReference, EqualsTheDefinition) {
  Definition d;
  int groups, stride, dilation;
  std::tie(groups, stride, dilation) = GetParam();
  d.groups = groups;
  d.stride_height = stride;
  d.stride_width = stride % 3 + 1;
  d.dilation_height = dilation;
  d.dilation_width = 3 - dilation;
  const bool depthwise = groups == 6;
  if (depthwise) d.out_channels = 6;
  std::mt19937 random(5);
  d.x.resize(d.channels * d.height * d.width);
  for (uint8_t& code : d.x) code = static_cast<uint8_t>(random());
  d.weight.resize(d.out_channels * d.channels / d.groups * d.kernel_height * d.kernel_width);
  for (int8_t& code : d.weight) code = static_cast<int8_t>(random());
  for (int64_t i = 0; i < d.out_channels; ++i) {
    d.bias.push_back(static_cast<int32_t>(random() % 10001) - 5000);
  }

  Conv2dArgs args;
  Conv2dShape& s = args.shape;
  s.out_height = d.out_height();
  s.out_width = d.out_width();
  s.groups = d.groups;
  s.in_channels = d.channels / d.groups;
  s.out_channels = d.out_channels / d.groups;
  s.kernel_height = d.kernel_height;
  s.kernel_width = d.kernel_width;
  s.stride_height = d.stride_height;
  s.stride_width = d.stride_width;
  s.dilation_height = d.dilation_height;
  s.dilation_width = d.dilation_width;

  // The padded NHWC image, and zero point and bias folded into the offset.
  const int64_t columns = d.width + 2 * d.padding, rows = d.height + 2 * d.padding;
  std::vector<uint8_t> x(rows * columns * d.channels + kOverread,
                         static_cast<uint8_t>(d.x_zero_point));
  for (int64_t c = 0; c < d.channels; ++c) {
    for (int64_t i = 0; i < d.height; ++i) {
      for (int64_t j = 0; j < d.width; ++j) {
        x[((i + d.padding) * columns + j + d.padding) * d.channels + c] =
            d.x[(c * d.height + i) * d.width + j];
      }
    }
  }
  const auto slot = [&](int64_t channel) {  // where offset and multiplier keep a channel
    if (depthwise) return channel;
    return channel / s.out_channels * s.blocks_per_group() * kChannelBlock +
           channel % s.out_channels;
  };
  std::vector<int32_t> offset(s.padded_channels());
  std::vector<float> multiplier(s.padded_channels());
  const int64_t reduction = s.in_channels * d.kernel_height * d.kernel_width;
  for (int64_t channel = 0; channel < d.out_channels; ++channel) {
    int32_t sum = 0;
    for (int64_t i = 0; i < reduction; ++i) sum += d.weight[channel * reduction + i];
    offset[slot(channel)] = d.bias[channel] - d.x_zero_point * sum;
    multiplier[slot(channel)] = 0.001f * static_cast<float>(1 + random() % 5);
  }
  // Output and residual have gaps, each its own.
  const int64_t y_pixel = d.out_channels + 1, y_row = s.out_width * y_pixel + 5;
  const int64_t residual_pixel = d.out_channels + 2;
  const int64_t residual_row = s.out_width * residual_pixel + 3;
  std::vector<int8_t> residual(s.out_height * residual_row);
  for (int8_t& code : residual) code = static_cast<int8_t>(random());

  args.x = x.data();
  args.x_pixel_stride = d.channels;
  args.x_row_stride = columns * d.channels;
  args.weight = d.weight.data();
  args.offset = offset.data();
  args.multiplier = multiplier.data();
  constexpr uint8_t kUntouched = 29;  // below the codes' lower bound
  std::vector<uint8_t> codes(s.out_height * y_row, kUntouched);
  args.y = codes.data();
  args.y_row_stride = y_row;
  args.y_pixel_stride = y_pixel;
  args.zero_point = 40;
  args.lo = 30;
  args.hi = 250;
  args.residual = residual.data();
  args.residual_row_stride = residual_row;
  args.residual_pixel_stride = residual_pixel;
  args.residual_signed = true;
  args.residual_zero_point = 11;
  args.residual_multiplier = 0.21f;

  const auto run = [&] {
    if (depthwise) {
      conv2d_depthwise(args, 0, s.out_height);
    } else {
      conv2d(args, 0, conv2d_units(s));
    }
  };
  const Kernel kernel = depthwise ? Kernel::conv2d_depthwise : Kernel::conv2d;
  run_on(Path::reference, kernel, run);
  std::vector<float> values(codes.size());
  args.output = Conv2dOutput::float32;
  args.y = values.data();
  run_on(Path::reference, kernel, run);

  for (int64_t pixel = 0; pixel < s.pixels(); ++pixel) {
    const int64_t row = pixel / s.out_width, column = pixel % s.out_width;
    for (int64_t channel = 0; channel < d.out_channels; ++channel) {
      const int64_t acc = d.accumulator(channel, row, column);
      const float product = static_cast<float>(acc) * multiplier[slot(channel)];
      const int64_t at = row * y_row + column * y_pixel + channel;
      const int64_t from = row * residual_row + column * residual_pixel + channel;
      const float centred = static_cast<float>(residual[from] - 11) * 0.21f;
      const float sum = product + centred;
      const double code = std::nearbyint(static_cast<double>(sum)) + 40;
      ASSERT_EQ(int{codes[at]}, static_cast<int>(std::clamp(code, 30.0, 250.0)))
          << "pixel " << pixel << " channel " << channel;
      ASSERT_EQ(values[at], product) << "pixel " << pixel << " channel " << channel;
      codes[at] = kUntouched;
    }
  }
  EXPECT_EQ(std::count(codes.begin(), codes.end(), kUntouched), std::ssize(codes))
      << "written between pixels";
}

INSTANTIATE_TEST_SUITE_P(GroupsStrideDilation, Conv2dReference,
                         ::testing::Combine(::testing::Values(1, 2, 3, 6),
                                            ::testing::Values(1, 2, 3), ::testing::Values(1, 2)));

}  // namespace
}  // namespace qtoolkit::kernels
