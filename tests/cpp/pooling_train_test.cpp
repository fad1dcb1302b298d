#include "kernels/pooling_train.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(MaxPool2dTrain, max_pool2d_train);
QT_FOR_EACH_PATH(MaxPool2dTrainBackward, max_pool2d_train_backward);

struct Axis {
  int64_t size, kernel, stride, padding, dilation;

  int64_t windows() const {
    return (size + 2 * padding - (kernel - 1) * dilation - 1) / stride + 1;
  }
};

struct Case {
  int64_t batch, channels;
  Axis rows, columns;
};
// size, kernel, stride, padding, dilation
const Case kCases[] = {
    {1, 1, {1, 1, 1, 0, 1}, {1, 1, 1, 0, 1}},      {2, 3, {7, 3, 2, 1, 1}, {9, 3, 2, 1, 1}},
    {1, 4, {5, 2, 2, 0, 1}, {6, 3, 1, 1, 1}},      {2, 17, {9, 3, 1, 1, 2}, {8, 2, 2, 1, 3}},
    {1, 39, {16, 16, 1, 8, 1}, {16, 16, 1, 0, 1}}, {3, 64, {5, 3, 2, 1, 1}, {6, 3, 3, 1, 1}}};

struct Data {
  explicit Data(const Case& c)
      : in_size(c.batch * c.rows.size * c.columns.size * c.channels),
        out_size(c.batch * c.rows.windows() * c.columns.windows() * c.channels),
        text(std::to_string(c.channels) + " channels of " + std::to_string(c.rows.size) + "x" +
             std::to_string(c.columns.size)) {
    args.height = c.rows.size;
    args.width = c.columns.size;
    args.channels = c.channels;
    args.out_height = c.rows.windows();
    args.out_width = c.columns.windows();
    args.row_kernel = c.rows.kernel;
    args.row_stride = c.rows.stride;
    args.row_padding = c.rows.padding;
    args.row_dilation = c.rows.dilation;
    args.column_kernel = c.columns.kernel;
    args.column_stride = c.columns.stride;
    args.column_padding = c.columns.padding;
    args.column_dilation = c.columns.dilation;
  }
  int64_t in_size, out_size;
  std::string text;
  MaxPool2dTrainArgs args;
};

// Few different values, so that many are equal; some NaN and infinite.
std::vector<float> values(Random& random, int64_t size) {
  std::vector<float> result(static_cast<size_t>(size));
  for (float& value : result) {
    value = static_cast<float>(random.integer(-3, 3));
    const int64_t special = random.integer(0, 60);
    if (special == 0) value = std::numeric_limits<float>::quiet_NaN();
    if (special == 1) value = -std::numeric_limits<float>::infinity();
  }
  return result;
}

struct Outputs {
  std::vector<uint8_t> y, taps;
  bool operator==(const Outputs&) const = default;
};

Outputs forward(Path path, Data data, const std::vector<float>& x, int64_t begin, int64_t end) {
  Guarded<float> y(data.out_size, 1);
  Guarded<uint8_t> taps(data.out_size, 3);
  data.args.x = x.data();
  data.args.y = y.data();
  data.args.taps = taps.data();
  run_on(path, Kernel::max_pool2d_train, [&] { max_pool2d_train(data.args, begin, end); });
  return {y.bytes(), taps.bytes()};
}

TEST_P(MaxPool2dTrain, HasTheBitsOfTheReference) {
  Random random(1);
  for (const Case& c : kCases) {
    const Data data(c);
    const std::vector<float> x = values(random, data.in_size);
    const int64_t rows = c.batch * data.args.out_height;
    for (const auto& [begin, end] : {std::pair{int64_t{0}, rows}, std::pair{rows / 3, rows / 2}}) {
      EXPECT_EQ(forward(GetParam(), data, x, begin, end),
                forward(Path::reference, data, x, begin, end))
          << data.text;
    }
  }
}

TEST_P(MaxPool2dTrainBackward, HasTheBitsOfTheReference) {
  Random random(2);
  for (const Case& c : kCases) {
    Data data(c);
    const std::vector<float> x = values(random, data.in_size);
    std::vector<float> y(static_cast<size_t>(data.out_size));
    std::vector<uint8_t> taps(static_cast<size_t>(data.out_size));
    data.args.x = x.data();
    data.args.y = y.data();
    data.args.taps = taps.data();
    const int64_t rows = c.batch * data.args.height;
    run_on(Path::reference, Kernel::max_pool2d_train,
           [&] { max_pool2d_train(data.args, 0, c.batch * data.args.out_height); });
    const std::vector<float> grad = random.reals(data.out_size, -2.0f, 2.0f);
    data.args.grad = grad.data();
    const auto backward = [&](Path path, int64_t begin, int64_t end) {
      Guarded<float> grad_x(data.in_size, 1);
      data.args.grad_x = grad_x.data();
      run_on(path, Kernel::max_pool2d_train_backward,
             [&] { max_pool2d_train_backward(data.args, begin, end); });
      return grad_x.bytes();
    };
    for (const auto& [begin, end] : {std::pair{int64_t{0}, rows}, std::pair{rows / 3, rows / 2}}) {
      EXPECT_EQ(backward(GetParam(), begin, end), backward(Path::reference, begin, end))
          << data.text;
    }
  }
}

}  // namespace
}  // namespace qtoolkit::kernels
