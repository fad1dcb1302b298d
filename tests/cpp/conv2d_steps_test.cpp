// Weights packed as steps: nothing is lost, nothing can saturate, and every path takes them.

#include "kernels/conv2d_steps.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/path.h"
#include "packed_weight.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

using testing::GuardedBuffer;

enum class Weights { normal, largest, most_negative, alternating, sparse, zero };

struct Case {
  int64_t groups, in_channels, out_channels, kernel_height, kernel_width;
  int64_t dilation = 1;
};

constexpr Case kCases[] = {{1, 1, 1, 1, 1},   {1, 3, 5, 3, 3},  {1, 64, 33, 1, 1},
                           {1, 31, 64, 3, 3}, {2, 5, 9, 3, 2},  {1, 6, 40, 3, 3, 2},
                           {1, 3, 64, 7, 7},  {3, 2, 3, 1, 5},  {1, 300, 8, 1, 1},
                           {1, 16, 8, 2, 2},  {1, 2, 12, 2, 1}, {4, 8, 8, 3, 3}};

Conv2dShape shape_of(const Case& c) {
  Conv2dShape shape;
  shape.out_height = 3;
  shape.out_width = 5;
  shape.groups = c.groups;
  shape.in_channels = c.in_channels;
  shape.out_channels = c.out_channels;
  shape.kernel_height = c.kernel_height;
  shape.kernel_width = c.kernel_width;
  shape.dilation_height = shape.dilation_width = c.dilation;
  return shape;
}

std::vector<int8_t> weights_of(const Conv2dShape& s, Weights kind) {
  std::vector<int8_t> weight(s.groups * s.out_channels * s.in_channels * s.kernel_height *
                             s.kernel_width);
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 45.0f);
  for (size_t i = 0; i < weight.size(); ++i) {
    int value = 0;
    switch (kind) {
      case Weights::normal:
        value = std::clamp(static_cast<int>(normal(random)), -127, 127);
        break;
      case Weights::largest:
        value = 127;
        break;
      case Weights::most_negative:
        value = -128;
        break;
      case Weights::alternating:
        value = i % 2 == 0 ? 127 : -128;
        break;
      case Weights::sparse:
        value = random() % 40 == 0 ? 100 : 0;
        break;
      case Weights::zero:
        break;
    }
    weight[i] = static_cast<int8_t>(value);
  }
  return weight;
}

class StepWeights : public ::testing::TestWithParam<std::tuple<Case, Weights>> {
 protected:
  const Conv2dShape shape_ = shape_of(std::get<0>(GetParam()));
  const std::vector<int8_t> weight_ = weights_of(shape_, std::get<1>(GetParam()));

  GuardedBuffer<int8_t> pack() const {
    GuardedBuffer<int8_t> packed(conv2d_packed_bytes(Conv2dLayout::steps, shape_, weight_.data()));
    pack_conv2d_weight(Conv2dLayout::steps, shape_, weight_.data(), packed.data());
    return packed;
  }
};

TEST_P(StepWeights, UnpackToTheWeight) {
  const auto packed = pack();
  std::vector<int8_t> weight(weight_.size(), 1);
  unpack_conv2d_weight(Conv2dLayout::steps, shape_, packed.data(), weight.data());
  EXPECT_EQ(weight, weight_);
}

// No pair of neighbours can leave 16 bits with codes of 255 and 0, whichever is which.
TEST_P(StepWeights, CannotSaturate) {
  const auto packed = pack();
  for (int64_t list = 0; list < conv2d_step_lists(shape_); ++list) {
    const Conv2dSteps steps = conv2d_steps(packed.data(), list);
    for (int64_t i = 0; i < steps.count * kStepBytes; i += 2) {
      const int a = steps.weight[i], b = steps.weight[i + 1];
      ASSERT_LE(255 * (std::max(a, 0) + std::max(b, 0)), 32767) << "step " << i / kStepBytes;
      ASSERT_GE(255 * (std::min(a, 0) + std::min(b, 0)), -32768) << "step " << i / kStepBytes;
    }
  }
}

// Each step but a few covers two bytes of input or more, however bad the weights are.
TEST_P(StepWeights, AreFew) {
  const auto packed = pack();
  const int64_t runs = shape_.kernel_height * shape_.runs_per_row();
  for (int64_t list = 0; list < conv2d_step_lists(shape_); ++list) {
    EXPECT_LE(conv2d_steps(packed.data(), list).count, runs * (shape_.run_bytes() / 2 + 2));
  }
}

TEST_P(StepWeights, EveryPathTakesThem) {
  const Conv2dShape& s = shape_;
  const int64_t in_channels = s.groups * s.in_channels, out_channels = s.groups * s.out_channels;
  const int64_t width = s.out_width + (s.kernel_width - 1) * s.dilation_width;
  const int64_t height = s.out_height + (s.kernel_height - 1) * s.dilation_height;
  GuardedBuffer<uint8_t> x(width * height * in_channels + (s.overreads() ? kOverread : 0));
  std::mt19937 random(4);
  for (uint8_t& code : x) code = static_cast<uint8_t>(random() % 3 == 0 ? 255 : random());
  const std::vector<int32_t> offset(s.padded_channels(), -3);
  const std::vector<float> multiplier(s.padded_channels(), 1.0f);
  const auto packed = pack();
  Conv2dArgs args;
  args.shape = s;
  args.x = x.data();
  args.x_pixel_stride = in_channels;
  args.x_row_stride = width * in_channels;
  args.weight = weight_.data();
  args.packed = packed.data();
  args.layout = Conv2dLayout::steps;
  args.offset = offset.data();
  args.multiplier = multiplier.data();
  args.output = Conv2dOutput::float32;
  args.y_pixel_stride = out_channels;
  args.y_row_stride = s.out_width * out_channels;
  const auto result_of = [&](Path path) {
    std::vector<float> y(s.pixels() * out_channels);
    args.y = y.data();
    run_on(path, Kernel::conv2d, [&] { conv2d(args, 0, conv2d_units(s)); });
    return y;
  };
  const std::vector<float> expected = result_of(Path::reference);
  for (Path path : runnable_paths(Kernel::conv2d)) {
    EXPECT_EQ(result_of(path), expected) << name(path);
  }
}

// A call for some blocks alone, as a caller makes that has them computed one after the other.
TEST_P(StepWeights, BlocksStandAlone) {
  const auto packed = pack();
  for (int64_t block = 0; block < shape_.groups * shape_.blocks_per_group(); ++block) {
    const int8_t* const part =
        conv2d_packed_block(Conv2dLayout::steps, shape_, packed.data(), block);
    for (int64_t list = 0; list < kListsPerBlock; ++list) {
      const auto whole = conv2d_steps(packed.data(), block * kListsPerBlock + list);
      const auto alone = conv2d_steps(part, list);
      EXPECT_EQ(alone.count, whole.count);
      EXPECT_EQ(alone.weight, whole.weight);
      EXPECT_EQ(alone.move, whole.move);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Conv2d, StepWeights,
    ::testing::Combine(::testing::ValuesIn(kCases),
                       ::testing::Values(Weights::normal, Weights::largest, Weights::most_negative,
                                         Weights::alternating, Weights::sparse, Weights::zero)));

}  // namespace
}  // namespace qtoolkit::kernels
