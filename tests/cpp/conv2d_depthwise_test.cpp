// The depthwise convolution on every path against the reference, bit for bit: several images with
// gaps between rows and images, all splits of the channels into vectors, and all splits of the
// rows. conv2d_test.cpp has the extreme values.

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/conv2d.h"
#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

using testing::GuardedBuffer;

struct Layer {
  int64_t images, height, width, channels;  // of the output
  int64_t kernel, stride;
  int64_t gap = 0;  // bytes or elements between rows, twice as many between images
  int64_t pixel_gap = 0;

  std::string name() const {
    std::string text;
    for (int64_t part : {images, height, width, channels, kernel, stride, gap, pixel_gap}) {
      text += (text.empty() ? "" : "_") + std::to_string(part);
    }
    return text;
  }
};

struct Output {
  const char* name;
  int32_t zero_point, lo, hi;
  float largest_multiplier = 0.01f;
  bool residual = false;
  Conv2dOutput kind = Conv2dOutput::codes;
};
const Output kOutputs[] = {
    {"ReLU6", 0, 0, 255},
    {"affine", 121, 0, 255},
    {"ReLU of a zero point", 7, 7, 255},
    {"upper bound", 0, 0, 200},
    {"signed", -3, -128, 127},
    {"signed bounds", 4, -100, 90},
    {"multipliers below 1", 100, 0, 255, 0.999999f},
    {"multipliers above 1", 100, 0, 255, 3.0f},
    {"residual", 50, 0, 255, 0.01f, true},
    {"float", 0, 0, 255, 0.01f, false, Conv2dOutput::float32},
};

// Where pixel (n, i, j) lies, in elements.
struct Strides {
  Strides(int64_t height, int64_t width, int64_t channels, int64_t gap, int64_t pixel_gap)
      : pixel(channels + pixel_gap), row(width * pixel + gap), image(height * row + 2 * gap) {}
  // To the last channel of the last pixel.
  int64_t size(int64_t images, int64_t height, int64_t width, int64_t channels) const {
    return (images - 1) * image + (height - 1) * row + (width - 1) * pixel + channels;
  }
  int64_t pixel, row, image;
};

// The arguments of a call over all images and all the memory they point to; every buffer is as
// small as the contract allows.
class Problem {
 public:
  Problem(const Layer& layer, const Output& output)
      : in_height_((layer.height - 1) * layer.stride + layer.kernel),
        in_width_((layer.width - 1) * layer.stride + layer.kernel),
        in_(in_height_, in_width_, layer.channels, layer.gap, layer.pixel_gap),
        out_(layer.height, layer.width, layer.channels, layer.gap / 2, 2 * layer.pixel_gap),
        out_size_(out_.size(layer.images, layer.height, layer.width, layer.channels)),
        x_(in_.size(layer.images, in_height_, in_width_, layer.channels)),
        residual_(out_size_),
        weight_(layer.channels * layer.kernel * layer.kernel),
        packed_(weight_.size()),
        offset_(layer.channels),
        multiplier_(layer.channels) {
    Random random(31);
    for (uint8_t& code : x_) code = static_cast<uint8_t>(random.bits());
    for (uint8_t& code : residual_) code = static_cast<uint8_t>(random.bits());
    for (int8_t& code : weight_) code = static_cast<int8_t>(random.bits());
    for (int32_t& value : offset_) value = static_cast<int32_t>(random.integer(-9000, 9000));
    for (float& value : multiplier_) {
      value = random.real(-0.1f * output.largest_multiplier, output.largest_multiplier);
    }
    args_.shape = {.images = layer.images,
                   .out_height = layer.height,
                   .out_width = layer.width,
                   .groups = layer.channels,
                   .in_channels = 1,
                   .out_channels = 1,
                   .kernel_height = layer.kernel,
                   .kernel_width = layer.kernel,
                   .stride_height = layer.stride,
                   .stride_width = layer.stride};
    pack_conv2d_depthwise_weight(args_.shape, weight_.data(), packed_.data());
    args_.x = x_.data();
    args_.x_image_stride = in_.image;
    args_.x_row_stride = in_.row;
    args_.x_pixel_stride = in_.pixel;
    args_.weight = weight_.data();
    args_.packed = packed_.data();
    args_.offset = offset_.data();
    args_.multiplier = multiplier_.data();
    args_.output = output.kind;
    args_.y_image_stride = out_.image;
    args_.y_row_stride = out_.row;
    args_.y_pixel_stride = out_.pixel;
    args_.zero_point = output.zero_point;
    args_.lo = output.lo;
    args_.hi = output.hi;
    if (output.residual) {
      args_.residual = residual_.data();
      args_.residual_image_stride = out_.image;
      args_.residual_row_stride = out_.row;
      args_.residual_pixel_stride = out_.pixel;
      args_.residual_zero_point = 130;
      args_.residual_multiplier = 0.37f;
    }
  }

  int64_t rows() const { return args_.shape.images * args_.shape.out_height; }

  // The bytes of y, gaps included, after all rows in calls of `step` of them.
  GuardedBuffer<uint8_t> run(int64_t step) {
    const int64_t element = args_.output == Conv2dOutput::float32 ? 4 : 1;
    GuardedBuffer<uint8_t> y(out_size_ * element, 0xa5);
    args_.y = y.data();
    for (int64_t row = 0; row < rows(); row += step) {
      conv2d_depthwise(args_, row, std::min(rows(), row + step));
    }
    return y;
  }

 private:
  int64_t in_height_, in_width_;
  Strides in_, out_;
  int64_t out_size_;
  GuardedBuffer<uint8_t> x_, residual_;
  GuardedBuffer<int8_t> weight_, packed_;
  GuardedBuffer<int32_t> offset_;
  GuardedBuffer<float> multiplier_;
  Conv2dArgs args_;
};

std::vector<Layer> layers() {
  std::vector<Layer> list;
  // Channels around every vector and sum of vectors.
  for (int64_t channels :
       {1, 8, 15, 16, 17, 24, 32, 40, 48, 55, 63, 64, 65, 72, 80, 96, 120, 128, 144, 184, 240}) {
    list.push_back({1, 3, 5, channels, 3, 1});
    list.push_back({1, 2, 6, channels, 3, 2, 64, 3});
    list.push_back({1, 3, 3, channels, 5, 1, 0, 1});
    list.push_back({1, 2, 3, channels, 5, 2, 10});
  }
  // Widths around every split of a row, odd and even heights, several images.
  for (int64_t width : {1, 2, 4, 7, 13, 14, 15, 28, 29, 57, 112}) {
    for (int64_t channels : {16, 32, 64}) {
      list.push_back({2, 3, width, channels, 3, 1, 32});
      list.push_back({1, 4, width, channels, 3, 2});
      list.push_back({1, 2, width, channels, 5, 1});
      list.push_back({2, 1, width, channels, 5, 2, 6});
      list.push_back({1, 3, width, channels, 7, 1});
    }
  }
  // Rows that are cut into parts, and so long ones that few are taken together.
  list.push_back({1, 3, 259, 16, 3, 1});
  list.push_back({1, 2, 131, 24, 5, 2});
  list.push_back({1, 5, 3, 17, 3, 1, 30000});
  list.push_back({3, 7, 7, 200, 3, 1, 16});
  list.push_back({5, 2, 2, 100, 4, 1});
  list.push_back({4, 3, 3, 80, 3, 3, 5, 5});
  return list;
}

QT_FOR_EACH_PATH(Conv2dDepthwise, conv2d_depthwise);

TEST_P(Conv2dDepthwise, EqualsTheReferenceBitForBit) {
  for (const Layer& layer : layers()) {
    SCOPED_TRACE(layer.name());
    for (const Output& output : kOutputs) {
      SCOPED_TRACE(output.name);
      Problem problem(layer, output);
      std::optional<GuardedBuffer<uint8_t>> expected, actual;
      run_on(Path::reference, Kernel::conv2d_depthwise,
             [&] { expected.emplace(problem.run(problem.rows())); });
      for (int64_t step : {problem.rows(), int64_t{3}, int64_t{1}}) {
        SCOPED_TRACE(step);
        run_on(GetParam(), Kernel::conv2d_depthwise, [&] { actual.emplace(problem.run(step)); });
        ASSERT_EQ(expected->size(), actual->size());
        for (int64_t i = 0; i < expected->size(); ++i) {
          ASSERT_EQ(int{(*expected)[i]}, int{(*actual)[i]}) << "byte " << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace qtoolkit::kernels
