// Every path of the convolution kernels against the reference, bit for bit.

#include "kernels/conv2d.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/path.h"
#include "packed_weight.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

using testing::GuardedBuffer;

struct Size {
  int64_t height, width;                      // of the output
  int64_t groups, in_channels, out_channels;  // channels per group
  int64_t kernel_height, kernel_width;
  int64_t stride = 1, dilation = 1;
  int64_t extra = 0;  // bytes between a pixel's channels and the next pixel, everywhere
  bool depthwise = false;
  int64_t stride_across = 0, dilation_across = 0;  // along the width, 0: the same

  int64_t stride_width() const { return stride_across != 0 ? stride_across : stride; }
  int64_t dilation_width() const { return dilation_across != 0 ? dilation_across : dilation; }
  std::string name() const {
    std::string text;
    for (int64_t part : {height, width, groups, in_channels, out_channels, kernel_height,
                         kernel_width, stride, dilation, extra, stride_width(), dilation_width()}) {
      text += (text.empty() ? "" : "_") + std::to_string(part);
    }
    return text;
  }
  Kernel kernel() const { return depthwise ? Kernel::conv2d_depthwise : Kernel::conv2d; }
};

enum class Residual { none, unsigned_codes, signed_codes };
enum class Values { random, largest, most_negative };

struct Variant {
  const char* name;
  Conv2dOutput output = Conv2dOutput::codes;
  int32_t zero_point = 128, lo = 0, hi = 255;
  Residual residual = Residual::none;
  bool relu = false;
  Values values = Values::random;
  float multiplier = 0.0f;  // 0: random ones that spread the outputs over the range
  float residual_multiplier = 0.37f;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const Variant kVariants[] = {
    {.name = "codes"},
    {.name = "relu", .zero_point = 0},
    {.name = "narrow bounds", .zero_point = 17, .lo = 17, .hi = 200},
    {.name = "signed", .zero_point = -5, .lo = -128, .hi = 127},
    {.name = "signed narrow", .zero_point = 3, .lo = -3, .hi = 100},
    {.name = "residual", .zero_point = 90, .residual = Residual::unsigned_codes},
    {.name = "relu residual", .zero_point = 0, .residual = Residual::unsigned_codes},
    // Its zero point times its multiplier is a float.
    {.name = "exact residual",
     .zero_point = 90,
     .residual = Residual::unsigned_codes,
     .residual_multiplier = 0.25f},
    {.name = "relu exact residual",
     .zero_point = 0,
     .residual = Residual::unsigned_codes,
     .residual_multiplier = 0.5f},
    {.name = "signed residual", .zero_point = 0, .residual = Residual::signed_codes},
    {.name = "all signed",
     .zero_point = -128,
     .lo = -128,
     .hi = 127,
     .residual = Residual::signed_codes},
    {.name = "float", .output = Conv2dOutput::float32},
    {.name = "float relu", .output = Conv2dOutput::float32, .relu = true},
    {.name = "float NaN", .output = Conv2dOutput::float32, .relu = true, .multiplier = kNan},
    {.name = "int32", .output = Conv2dOutput::int32, .values = Values::largest},
    {.name = "largest", .values = Values::largest},
    {.name = "largest, rounding away nothing", .values = Values::largest, .multiplier = 1.0f},
    {.name = "most negative", .values = Values::most_negative},
    {.name = "past int32", .values = Values::largest, .multiplier = 1e6f},
    {.name = "past -int32", .values = Values::most_negative, .multiplier = 1e6f},
    {.name = "past float",
     .residual = Residual::unsigned_codes,
     .multiplier = 3e38f,
     .residual_multiplier = 3e38f},
    {.name = "infinite", .zero_point = 77, .multiplier = kInfinity},
    {.name = "NaN", .zero_point = 77, .lo = 70, .hi = 80, .multiplier = kNan},
    {.name = "NaN of the residual",
     .zero_point = -7,
     .lo = -128,
     .hi = 127,
     .residual = Residual::unsigned_codes,
     .residual_multiplier = kInfinity},
};

// The arguments of one call and all the memory they point to; every buffer is as small as the
// contract allows.
class Problem {
 public:
  // `gap`: elements between an output row and the next; the residual's rows have more.
  Problem(const Size& size, const Variant& variant, int64_t gap)
      : shape_(shape_of(size)),
        columns_((size.width - 1) * size.stride_width() +
                 (size.kernel_width - 1) * size.dilation_width() + 1),
        rows_((size.height - 1) * size.stride + (size.kernel_height - 1) * size.dilation + 1),
        in_stride_(size.groups * size.in_channels + size.extra),
        out_channels_(size.groups * size.out_channels),
        out_stride_(out_channels_ + size.extra),
        x_(rows_ * columns_ * in_stride_ - size.extra +
           (!size.depthwise && shape_.overreads() ? kOverread : 0)),
        weight_(out_channels_ * shape_.in_channels * shape_.kernel_height * shape_.kernel_width),
        offset_(size.depthwise ? size.groups : shape_.padded_channels()),
        multiplier_(offset_.size()),
        y_row_stride_(size.width * out_stride_ + gap),
        y_size_(size.height * y_row_stride_ - gap - size.extra),
        residual_row_stride_(y_row_stride_ + 2 * gap),
        residual_(size.height * residual_row_stride_ - 3 * gap - size.extra) {
    fill(variant);
    args_.shape = shape_;
    args_.x = x_.data();
    args_.x_row_stride = columns_ * in_stride_;
    args_.x_pixel_stride = in_stride_;
    args_.weight = weight_.data();
    args_.offset = offset_.data();
    args_.multiplier = multiplier_.data();
    args_.output = variant.output;
    args_.y_row_stride = y_row_stride_;
    args_.y_pixel_stride = out_stride_;
    args_.zero_point = variant.zero_point;
    args_.lo = variant.lo;
    args_.hi = variant.hi;
    args_.relu = variant.relu;
    if (variant.residual != Residual::none) {
      args_.residual = residual_.data();
      args_.residual_row_stride = residual_row_stride_;
      args_.residual_pixel_stride = out_stride_;
      args_.residual_signed = variant.residual == Residual::signed_codes;
      args_.residual_zero_point = args_.residual_signed ? -9 : 121;
      args_.residual_multiplier = variant.residual_multiplier;
    }
  }

  // The bytes of y, with those between pixels and rows, after units [0, end) in uneven ranges.
  GuardedBuffer<uint8_t> run() {
    const int64_t element = args_.output == Conv2dOutput::codes ? 1 : 4;
    GuardedBuffer<uint8_t> y(y_size_ * element, 0xa5);
    args_.y = y.data();
    const bool depthwise = offset_.size() != shape_.padded_channels();
    const auto packed = depthwise ? pack_depthwise_weight(args_) : pack_weight(args_, layout_);
    const int64_t units = depthwise ? shape_.out_height : conv2d_units(shape_);
    const auto kernel = depthwise ? conv2d_depthwise : conv2d;
    kernel(args_, 0, units / 3);
    kernel(args_, units / 3, units / 3);
    kernel(args_, units / 3, units);
    return y;
  }

  const Conv2dArgs& args() const { return args_; }
  // Of the weights, instead of the one that the path prefers.
  void set_layout(Conv2dLayout layout) { layout_ = layout; }

 private:
  static Conv2dShape shape_of(const Size& size) {
    Conv2dShape shape;
    shape.out_height = size.height;
    shape.out_width = size.width;
    shape.groups = size.groups;
    shape.in_channels = size.in_channels;
    shape.out_channels = size.out_channels;
    shape.kernel_height = size.kernel_height;
    shape.kernel_width = size.kernel_width;
    shape.stride_height = size.stride;
    shape.stride_width = size.stride_width();
    shape.dilation_height = size.dilation;
    shape.dilation_width = size.dilation_width();
    return shape;
  }

  void fill(const Variant& variant) {
    std::mt19937 random(17);
    const int sign = variant.values == Values::largest ? 1 : -1;
    for (uint8_t& code : x_) {
      code = variant.values == Values::random ? static_cast<uint8_t>(random()) : 255;
    }
    for (int8_t& code : weight_) {
      code = static_cast<int8_t>(variant.values == Values::random ? random() : sign * 127);
    }
    for (uint8_t& code : residual_) code = static_cast<uint8_t>(random());
    for (int32_t& value : offset_) value = static_cast<int32_t>(random() % 20001) - 10000;
    // An accumulator of k products is about 150 * 74 * sqrt(k) wide.
    const double reduction =
        static_cast<double>(weight_.size()) / static_cast<double>(out_channels_);
    for (float& value : multiplier_) {
      const double spread = 0.5 + static_cast<double>(random() % 1000) / 1000;
      value = variant.multiplier != 0.0f
                  ? variant.multiplier
                  : static_cast<float>(60 * spread / (11000 * std::sqrt(reduction)));
    }
  }

  Conv2dShape shape_;
  int64_t columns_, rows_, in_stride_, out_channels_, out_stride_;
  GuardedBuffer<uint8_t> x_;
  GuardedBuffer<int8_t> weight_;
  GuardedBuffer<int32_t> offset_;
  GuardedBuffer<float> multiplier_;
  int64_t y_row_stride_, y_size_, residual_row_stride_;
  GuardedBuffer<uint8_t> residual_;
  Conv2dArgs args_;
  std::optional<Conv2dLayout> layout_;
};

const std::vector<Size>& sizes() {
  static const std::vector<Size> result = {
      // height, width, groups, in, out, kernel, stride, dilation, extra
      {1, 1, 1, 1, 1, 1, 1},
      {1, 1, 1, 64, 33, 1, 1},
      {1, 3, 1, 3, 5, 3, 3},
      {5, 7, 1, 3, 16, 3, 3},
      {3, 5, 1, 5, 31, 3, 3},
      {9, 11, 1, 3, 64, 7, 7, 2},
      {4, 6, 1, 16, 17, 5, 5, 1, 1},
      {7, 7, 1, 33, 32, 1, 1, 2},
      {7, 3, 1, 31, 33, 3, 3, 3},
      {5, 5, 1, 16, 64, 3, 3, 1, 2},
      {6, 5, 1, 7, 40, 3, 3, 2, 2},
      {14, 14, 1, 64, 64, 3, 3, 1},
      {5, 9, 1, 6, 48, 1, 3},
      {5, 9, 1, 6, 15, 5, 1, 1, 2},
      {5, 7, 2, 3, 5, 3, 3},
      {5, 7, 2, 16, 33, 3, 3, 2},
      {5, 7, 4, 5, 16, 3, 3, 1, 2},
      {3, 7, 4, 1, 3, 5, 5, 3},
      {8, 8, 4, 8, 8, 1, 1},
      {5, 7, 2, 5, 9, 3, 3, 1, 2, 7},
      // For tiles of 16 pixels and 16 quads: rows of one tile and more, pixels of several rows in a
      // tile, runs that tiles divide or not, more blocks and segments than are taken at once.
      {1, 2, 1, 64, 40, 1, 1},
      {1, 16, 1, 64, 64, 1, 1},
      {1, 17, 1, 116, 40, 1, 1},
      {1, 300, 1, 68, 33, 1, 1},
      {1, 5, 1, 64, 600, 1, 1},
      {1, 3, 1, 17, 1100, 1, 1},
      {3, 16, 1, 24, 33, 3, 3},
      {4, 35, 1, 20, 32, 3, 3},
      {3, 31, 1, 12, 96, 5, 5},
      {7, 7, 1, 68, 64, 3, 3},
      {9, 5, 1, 64, 33, 1, 1, 2},
      {2, 18, 1, 4, 48, 3, 9, 2, 2},
      {2, 9, 2, 68, 33, 5, 5, 1, 2},
      {2, 5, 2, 68, 20, 5, 7},
      {2, 3, 1, 8, 17, 13, 11, 1, 2},
      // Linear layers of few rows and many weights, with one and several blocks of channels left.
      {1, 1, 1, 515, 225, 1, 1},
      {1, 2, 1, 512, 96, 1, 1},
      {1, 3, 1, 600, 129, 1, 1},
      {1, 4, 1, 513, 96, 1, 1},
      {2, 3, 1, 512, 70, 1, 1, 2},
      {1, 7, 1, 530, 33, 1, 1},
      {2, 7, 1, 512, 64, 1, 1},
      {3, 5, 1, 512, 65, 1, 1},
      {4, 7, 1, 519, 40, 1, 1},
      // What the AVX2 path computes in Winograd's way, with odd sizes.
      {1, 1, 1, 32, 8, 3, 3},
      {9, 5, 2, 32, 40, 3, 3, 1, 1, 3},
      {6, 13, 2, 64, 33, 3, 3},
      {3, 2, 1, 96, 70, 3, 3},
      {2, 3, 1, 1824, 4, 3, 3},  // the most input channels
      {2, 3, 1, 1856, 4, 3, 3},
      {.height = 5,
       .width = 7,
       .groups = 1,
       .in_channels = 6,
       .out_channels = 40,
       .kernel_height = 3,
       .kernel_width = 2,
       .stride = 2,
       .dilation = 2,
       .stride_across = 3,
       .dilation_across = 1},
  };
  return result;
}

const std::vector<Size>& depthwise_sizes() {
  static const std::vector<Size> result = [] {
    std::vector<Size> list = {
        {1, 1, 1, 1, 1, 1, 1},           {5, 9, 7, 1, 1, 3, 3},     {5, 6, 16, 1, 1, 3, 3, 2},
        {7, 5, 33, 1, 1, 3, 3, 3},       {5, 5, 96, 1, 1, 3, 3},    {4, 7, 96, 1, 1, 3, 3, 2, 2},
        {3, 5, 64, 1, 1, 5, 5, 1, 2},    {5, 3, 33, 1, 1, 7, 7, 2}, {6, 4, 17, 1, 1, 1, 5},
        {6, 4, 65, 1, 1, 4, 2},          {2, 9, 130, 1, 1, 9, 9},   {5, 5, 31, 1, 1, 3, 3, 1, 1, 5},
        {5, 5, 72, 1, 1, 3, 3, 2, 1, 9}, {3, 3, 1, 1, 1, 3, 3},     {2, 2, 70, 1, 1, 13, 12},
    };
    list.push_back({.height = 6,
                    .width = 5,
                    .groups = 70,
                    .in_channels = 1,
                    .out_channels = 1,
                    .kernel_height = 3,
                    .kernel_width = 3,
                    .dilation = 2,
                    .stride_across = 2,
                    .dilation_across = 1});
    for (Size& size : list) size.depthwise = true;
    return list;
  }();
  return result;
}

GuardedBuffer<uint8_t> result_of(Path path, Kernel kernel, Problem& problem) {
  std::optional<GuardedBuffer<uint8_t>> y;
  run_on(path, kernel, [&] { y.emplace(problem.run()); });
  return std::move(*y);
}

// --- every path equals the reference ------------------------------------------------------------

using PathCase = std::tuple<Size, Path>;
class Conv2dPath : public ::testing::TestWithParam<PathCase> {};

TEST_P(Conv2dPath, EqualsTheReferenceBitForBit) {
  const auto& [size, path] = GetParam();
  for (const Variant& variant : kVariants) {
    if (size.depthwise && variant.output == Conv2dOutput::int32) continue;
    for (int64_t gap : {0, 13}) {
      SCOPED_TRACE(std::string(variant.name) + ", gap " + std::to_string(gap));
      Problem problem(size, variant, gap);
      const auto expected = result_of(Path::reference, size.kernel(), problem);
      const auto actual = result_of(path, size.kernel(), problem);
      ASSERT_EQ(expected.size(), actual.size());
      for (int64_t i = 0; i < expected.size(); ++i) {
        ASSERT_EQ(int{expected[i]}, int{actual[i]}) << "byte " << i << " of " << expected.size();
      }
    }
  }
}

// Weights that were packed for another path, or at run time.
TEST_P(Conv2dPath, TakesEveryLayout) {
  const auto& [size, path] = GetParam();
  if (size.depthwise) return;
  const std::pair<const char*, Conv2dLayout> layouts[] = {
      {"quads", Conv2dLayout::quads},
      {"steps", Conv2dLayout::steps},
      {"summed quads", Conv2dLayout::summed_quads}};
  for (const auto& [layout_name, layout] : layouts) {
    for (const char* name : {"residual", "most negative", "largest", "int32"}) {
      const auto* const variant = std::ranges::find_if(
          kVariants, [&](const Variant& v) { return std::string(v.name) == name; });
      ASSERT_NE(variant, std::end(kVariants)) << name;
      SCOPED_TRACE(std::string(name) + ", " + layout_name);
      Problem problem(size, *variant, 0);
      problem.set_layout(layout);
      const auto expected = result_of(Path::reference, size.kernel(), problem);
      const auto actual = result_of(path, size.kernel(), problem);
      ASSERT_TRUE(std::equal(expected.data(), expected.data() + expected.size(), actual.data()));
    }
  }
}

std::string case_name(const ::testing::TestParamInfo<PathCase>& info) {
  return std::string(name(std::get<1>(info.param))) + "_" + std::get<0>(info.param).name();
}

INSTANTIATE_TEST_SUITE_P(Conv2d, Conv2dPath,
                         ::testing::Combine(::testing::ValuesIn(sizes()),
                                            ::testing::ValuesIn(runnable_paths(Kernel::conv2d))),
                         case_name);
INSTANTIATE_TEST_SUITE_P(
    Depthwise, Conv2dPath,
    ::testing::Combine(::testing::ValuesIn(depthwise_sizes()),
                       ::testing::ValuesIn(runnable_paths(Kernel::conv2d_depthwise))),
    case_name);

// --- the choice of paths ------------------------------------------------------------------------

class Conv2dPaths : public ::testing::TestWithParam<Kernel> {};

TEST_P(Conv2dPaths, AllThatThisMachineShouldHaveRun) {
  const Kernel kernel = GetParam();
  std::vector<Path> expected = {Path::reference, Path::portable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) expected.push_back(Path::avx2);
  if (__builtin_cpu_supports("avx512vnni")) expected.push_back(Path::avx512vnni);
  if (kernel == Kernel::conv2d && supported(Path::amx)) expected.push_back(Path::amx);
#elif defined(__aarch64__)
  if (supported(Path::neondot)) expected.push_back(Path::neondot);
#endif
  Size size{3, 3, 4, 1, 1, 3, 3};
  size.depthwise = kernel == Kernel::conv2d_depthwise;
  for (Path path : expected) {
    Problem problem(size, kVariants[0], 0);
    result_of(path, kernel, problem);
  }
  EXPECT_EQ(selected_path(kernel), expected.back());
}

INSTANTIATE_TEST_SUITE_P(Kernels, Conv2dPaths,
                         ::testing::Values(Kernel::conv2d, Kernel::conv2d_depthwise),
                         [](const auto& info) { return std::string(name(info.param)); });

TEST(Conv2dPack, UnpackingGivesTheWeightBack) {
  const Conv2dShape shapes[] = {
      {.in_channels = 3, .out_channels = 33, .kernel_height = 7, .kernel_width = 7},
      {.groups = 2, .in_channels = 5, .out_channels = 31, .kernel_height = 1, .kernel_width = 3},
      {.in_channels = 6,
       .out_channels = 4,
       .kernel_height = 3,
       .kernel_width = 2,
       .dilation_width = 2},
  };
  Random random(7);
  for (const Conv2dShape& s : shapes) {
    const auto count = static_cast<size_t>(s.groups * s.out_channels * s.in_channels *
                                           s.kernel_height * s.kernel_width);
    std::vector<int8_t> weight(count);
    for (int8_t& w : weight) w = static_cast<int8_t>(random.bits());
    for (const Conv2dLayout layout : {Conv2dLayout::quads, Conv2dLayout::summed_quads}) {
      GuardedBuffer<int8_t> packed(conv2d_packed_bytes(layout, s, weight.data()));
      std::vector<int8_t> again(count);
      pack_conv2d_weight(layout, s, weight.data(), packed.data());
      unpack_conv2d_weight(layout, s, packed.data(), again.data());
      EXPECT_EQ(again, weight);
    }
  }
  const Conv2dShape depthwise{
      .groups = 37, .in_channels = 1, .out_channels = 1, .kernel_height = 3, .kernel_width = 5};
  std::vector<int8_t> weight(37 * 15), packed(weight.size()), again(weight.size());
  for (int8_t& w : weight) w = static_cast<int8_t>(random.bits());
  pack_conv2d_depthwise_weight(depthwise, weight.data(), packed.data());
  unpack_conv2d_depthwise_weight(depthwise, packed.data(), again.data());
  EXPECT_EQ(again, weight);
  EXPECT_NE(packed, weight);
}

}  // namespace
}  // namespace qtoolkit::kernels
