#include "kernels/softmax.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(Softmax, softmax);

using testing::GuardedBuffer;

constexpr int64_t kRows = 5;
const int64_t kLengths[] = {1, 2, 7, 15, 16, 17, 49, 63, 64, 65, 197, 255, 256, 257, 1000};
const float kScales[] = {1e-4f, 0.02f, 0.3f, 5.0f, 3e38f};

template <class Check>
void for_each_case(Check check) {
  Random random(1);
  for (int64_t length : kLengths) {
    for (float scale : kScales) {
      for (int options = 0; options < 8; ++options) {
        GuardedBuffer<uint8_t> x(kRows * (length + 1) - 1);  // rows lie a byte apart
        for (uint8_t& code : x) code = static_cast<uint8_t>(random.bits());
        for (int64_t i = 0; i < length; ++i) x[i] = 200;  // a row of equal codes
        SoftmaxArgs args;
        args.x = x.data();
        args.is_signed = (options & 1) != 0;
        args.length = length;
        args.x_row_stride = length + 1;
        args.y_row_stride = length + (options & 2);
        args.table = softmax_table(scale);
        if ((options & 4) != 0) {
          args.y_scale = 1.0f / 127;
          args.zero_point = -100;
          args.lo = -128;
          args.hi = 20;
        } else {
          args.y_scale = 1.0f / 256;
        }
        check(args, std::to_string(length) + " codes of scale " + std::to_string(scale) +
                        ", options " + std::to_string(options));
      }
    }
  }
}

template <class T>
std::vector<uint8_t> output(Path path, SoftmaxArgs args, int64_t begin, int64_t end) {
  Guarded<T> y(kRows * args.y_row_stride, 1);
  if constexpr (sizeof(T) == 4) {
    args.y_float = y.data();
  } else {
    args.y = y.data();
  }
  run_on(path, Kernel::softmax, [&] { softmax(args, begin, end); });
  return y.bytes();
}

TEST_P(Softmax, GivesTheReferencesBits) {
  for_each_case([&](const SoftmaxArgs& args, const std::string& text) {
    for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, kRows}, {1, 4}, {2, 2}}) {
      EXPECT_EQ(output<uint8_t>(GetParam(), args, begin, end),
                output<uint8_t>(Path::reference, args, begin, end))
          << text;
      EXPECT_EQ(output<float>(GetParam(), args, begin, end),
                output<float>(Path::reference, args, begin, end))
          << text;
    }
  });
}

TEST(SoftmaxTable, IsNearTheExponential) {
  for (float scale : {1e-7f, 1e-3f, 0.0417f, 0.2f, 0.33f, 1.7f, 40.0f, 3e38f}) {
    const SoftmaxTable table = softmax_table(scale);
    EXPECT_EQ(table.at(0), 1.0f);
    for (int d = 0; d < 256; ++d) {
      const double exact = std::exp(-static_cast<double>(scale) * d);
      if (exact > 1.1e-15) {
        EXPECT_NEAR(table.at(d) / exact, 1.0, 2.5e-7) << scale << " * " << d;
      } else {
        EXPECT_LE(table.at(d), 1.1e-15f) << scale << " * " << d;
      }
    }
  }
}

TEST(SoftmaxReference, IsNearTheExactSoftmax) {
  for_each_case([&](SoftmaxArgs args, const std::string& text) {
    std::vector<float> y(kRows * args.y_row_stride);
    args.y_float = y.data();
    run_on(Path::reference, Kernel::softmax, [&] { softmax(args, 0, kRows); });
    for (int64_t row = 0; row < kRows; ++row) {
      double sum = 0;
      std::vector<double> exact;
      for (int64_t i = 0; i < args.length; ++i) {
        const uint8_t code = args.x[row * args.x_row_stride + i];
        exact.push_back(args.is_signed ? static_cast<int8_t>(code) : int{code});
      }
      const double largest = *std::max_element(exact.begin(), exact.end());
      for (double& value : exact) {
        value = args.table.at(static_cast<int32_t>(largest - value));
        sum += value;
      }
      for (int64_t i = 0; i < args.length; ++i) {
        ASSERT_NEAR(y[row * args.y_row_stride + i], exact[i] / sum, 1e-6 * exact[i] / sum) << text;
      }
    }
  });
}

TEST_P(Softmax, HandComputedValues) {
  const std::vector<uint8_t> x = {3, 3, 5, 5};  // exp(-ln 2) of the difference 2
  SoftmaxArgs args;
  args.x = x.data();
  args.length = args.x_row_stride = args.y_row_stride = 4;
  args.table = softmax_table(static_cast<float>(std::log(2.0) / 2));
  args.y_scale = 1.0f / 300;
  args.hi = 99;
  std::vector<uint8_t> y(4);
  args.y = y.data();
  run_on(GetParam(), Kernel::softmax, [&] { softmax(args, 0, 1); });
  EXPECT_EQ(y, (std::vector<uint8_t>{50, 50, 99, 99}));  // 1/6 and 1/3 of 300, cut
}

}  // namespace
}  // namespace qtoolkit::kernels
