// A convolution call over several images, on every path: bit for bit what the reference gives for
// each image in a call of its own.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/conv2d.h"
#include "kernels/path.h"
#include "packed_weight.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

using testing::GuardedBuffer;

struct Batch {
  int64_t images, height, width;              // of the output
  int64_t groups, in_channels, out_channels;  // channels per group
  int64_t kernel, stride;
  int64_t gap;         // bytes between images of the input
  int64_t border = 0;  // elements between output rows, and three times as many between images

  std::string name() const {
    std::string text;
    for (int64_t part :
         {images, height, width, groups, in_channels, out_channels, kernel, stride, gap, border}) {
      text += (text.empty() ? "" : "_") + std::to_string(part);
    }
    return text;
  }
};

enum class Output { codes, codes_with_residual, float32 };

// The arguments of a call over all images and all the memory they point to; every buffer is as
// small as the contract allows.
class Problem {
 public:
  Problem(const Batch& batch, Output output)
      : shape_(shape_of(batch)),
        row_bytes_(((batch.width - 1) * batch.stride + batch.kernel) * channels()),
        image_stride_(((batch.height - 1) * batch.stride + batch.kernel) * row_bytes_ + batch.gap),
        x_(batch.images * image_stride_ - batch.gap + (shape_.overreads() ? kOverread : 0)),
        weight_(out_channels() * shape_.in_channels * batch.kernel * batch.kernel),
        offset_(shape_.padded_channels()),
        multiplier_(shape_.padded_channels()),
        y_row_(batch.width * out_channels() + batch.border),
        y_image_(batch.height * y_row_ + 3 * batch.border),
        residual_row_(y_row_ + batch.border),
        residual_image_(batch.height * residual_row_ + batch.border),
        y_size_(batch.images * y_image_ - 4 * batch.border),
        residual_(batch.images * residual_image_ - 3 * batch.border) {
    std::mt19937 random(23);
    for (uint8_t& code : x_) code = static_cast<uint8_t>(random());
    for (int8_t& code : weight_) code = static_cast<int8_t>(random());
    for (uint8_t& code : residual_) code = static_cast<uint8_t>(random());
    for (int32_t& value : offset_) value = static_cast<int32_t>(random() % 20001) - 10000;
    // An accumulator of k products is about 150 * 74 * sqrt(k) wide.
    const double reduction = static_cast<double>(shape_.in_channels * batch.kernel * batch.kernel);
    for (float& value : multiplier_) {
      const double spread = 0.5 + static_cast<double>(random() % 1000) / 1000;
      value = static_cast<float>(60 * spread / (11000 * std::sqrt(reduction)));
    }
    args_.shape = shape_;
    args_.x = x_.data();
    args_.x_image_stride = image_stride_;
    args_.x_row_stride = row_bytes_;
    args_.x_pixel_stride = channels();
    args_.weight = weight_.data();
    args_.offset = offset_.data();
    args_.multiplier = multiplier_.data();
    args_.y_image_stride = y_image_;
    args_.y_row_stride = y_row_;
    args_.y_pixel_stride = out_channels();
    args_.zero_point = 121;
    if (output == Output::float32) args_.output = Conv2dOutput::float32;
    if (output == Output::codes_with_residual) {
      args_.residual = residual_.data();
      args_.residual_image_stride = residual_image_;
      args_.residual_row_stride = residual_row_;
      args_.residual_pixel_stride = out_channels();
      args_.residual_zero_point = 130;
      args_.residual_multiplier = 0.37f;
    }
  }

  // The bytes of y after one call for each image.
  GuardedBuffer<uint8_t> image_by_image() {
    GuardedBuffer<uint8_t> y(y_bytes(), 0xa5);
    const auto packed = pack_weight(args_);
    Conv2dArgs args = args_;
    args.shape.images = 1;
    args.x_image_stride = args.y_image_stride = args.residual_image_stride = 0;
    for (int64_t n = 0; n < shape_.images; ++n) {
      args.x = args_.x + n * image_stride_;
      args.y = y.data() + n * y_image_ * element();
      if (args_.residual != nullptr) args.residual = residual_.data() + n * residual_image_;
      conv2d(args, 0, conv2d_units(args.shape));
    }
    return y;
  }

  // The same after units [0, end) of all images, in ranges of `range` units.
  GuardedBuffer<uint8_t> at_once(int64_t range) {
    GuardedBuffer<uint8_t> y(y_bytes(), 0xa5);
    args_.y = y.data();
    const auto packed = pack_weight(args_);
    const int64_t units = conv2d_units(shape_);
    for (int64_t unit = 0; unit < units; unit += range) {
      conv2d(args_, unit, std::min(units, unit + range));
    }
    return y;
  }

  int64_t units() const { return conv2d_units(shape_); }

 private:
  static Conv2dShape shape_of(const Batch& batch) {
    return {.images = batch.images,
            .out_height = batch.height,
            .out_width = batch.width,
            .groups = batch.groups,
            .in_channels = batch.in_channels,
            .out_channels = batch.out_channels,
            .kernel_height = batch.kernel,
            .kernel_width = batch.kernel,
            .stride_height = batch.stride,
            .stride_width = batch.stride};
  }
  int64_t channels() const { return shape_.groups * shape_.in_channels; }
  int64_t out_channels() const { return shape_.groups * shape_.out_channels; }
  int64_t element() const { return args_.output == Conv2dOutput::float32 ? 4 : 1; }
  int64_t y_bytes() const { return y_size_ * element(); }

  Conv2dShape shape_;
  int64_t row_bytes_, image_stride_;
  GuardedBuffer<uint8_t> x_;
  GuardedBuffer<int8_t> weight_;
  GuardedBuffer<int32_t> offset_;
  GuardedBuffer<float> multiplier_;
  int64_t y_row_, y_image_, residual_row_, residual_image_, y_size_;
  GuardedBuffer<uint8_t> residual_;
  Conv2dArgs args_;
};

// Maps smaller than a tile, of a tile's size and larger, so that tiles hold pixels of up to
// fourteen images, end with an image and end within a row.
constexpr Batch kBatches[] = {
    // images, height, width, groups, in, out, kernel, stride, gap, border
    {32, 1, 1, 1, 8, 33, 3, 1, 0},     {29, 1, 1, 1, 5, 16, 1, 1, 3},
    {9, 2, 2, 1, 16, 64, 3, 1, 0},     {5, 2, 3, 1, 3, 17, 3, 2, 7},
    {4, 4, 4, 1, 8, 40, 3, 1, 0},      {3, 3, 5, 2, 4, 9, 3, 1, 11},
    {3, 7, 7, 1, 8, 32, 3, 2, 0},      {5, 5, 7, 1, 32, 72, 3, 1, 9},
    {23, 1, 2, 2, 32, 16, 3, 1, 0},    {2, 3, 14, 1, 5, 8, 1, 1, 5},
    {2, 5, 16, 1, 4, 33, 1, 2, 0},     {2, 1, 9, 3, 3, 5, 2, 1, 64},
    {9, 2, 2, 1, 16, 64, 3, 1, 0, 17}, {4, 4, 4, 1, 8, 40, 3, 1, 0, 40},
    {3, 7, 7, 1, 8, 32, 3, 2, 0, 64},  {2, 3, 14, 2, 5, 8, 1, 1, 5, 3},
    {17, 1, 1, 1, 8, 33, 1, 1, 0, 1},
};

class Conv2dBatch : public ::testing::TestWithParam<std::tuple<Batch, Path>> {};

TEST_P(Conv2dBatch, EqualsTheReferenceImageByImage) {
  const auto& [batch, path] = GetParam();
  for (Output output : {Output::codes, Output::codes_with_residual, Output::float32}) {
    SCOPED_TRACE(static_cast<int>(output));
    Problem problem(batch, output);
    std::optional<GuardedBuffer<uint8_t>> expected, actual;
    run_on(Path::reference, Kernel::conv2d, [&] { expected.emplace(problem.image_by_image()); });
    for (int64_t range : {problem.units(), int64_t{5}, int64_t{1}}) {
      SCOPED_TRACE(range);
      run_on(path, Kernel::conv2d, [&] { actual.emplace(problem.at_once(range)); });
      ASSERT_EQ(expected->size(), actual->size());
      for (int64_t i = 0; i < expected->size(); ++i) {
        ASSERT_EQ(int{(*expected)[i]}, int{(*actual)[i]}) << "byte " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, Conv2dBatch,
                         ::testing::Combine(::testing::ValuesIn(kBatches),
                                            ::testing::ValuesIn(runnable_paths(Kernel::conv2d))),
                         [](const auto& info) {
                           return std::string(name(std::get<1>(info.param))) + "_" +
                                  std::get<0>(info.param).name();
                         });

}  // namespace
}  // namespace qtoolkit::kernels
