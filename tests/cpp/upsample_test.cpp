#include "kernels/upsample.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/path.h"
#include "kernels/resample.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(UpsampleBilinear2d, upsample_bilinear2d);

using testing::GuardedBuffer;

struct Sizes {
  int64_t batch, height, width, out_height, out_width;
};
const Sizes kSizes[] = {{1, 1, 1, 1, 1}, {2, 3, 4, 6, 8}, {1, 5, 7, 8, 3},
                        {1, 1, 1, 4, 3}, {2, 4, 3, 4, 3}, {1, 2, 9, 7, 20}};

struct Output {
  int32_t x_zero_point, zero_point, lo, hi;
  float factor;
};
const Output kOutputs[] = {{0, 0, 0, 255, 1.0f},
                           {128, 100, 0, 255, 0.37f},
                           {-3, 5, -128, 127, 1.9f},
                           {60, 8, 8, 200, 1e30f},
                           {7, 9, 0, 255, std::numeric_limits<float>::infinity()}};

template <class Check>
void for_each_case(Check check) {
  Random random(1);
  for (const Sizes& s : kSizes) {
    for (int64_t channels : {1, 3, 4, 15, 16, 17, 63, 64, 65, 80, 130, 144}) {
      GuardedBuffer<uint8_t> x(s.batch * s.height * s.width * channels);
      for (uint8_t& code : x) code = static_cast<uint8_t>(random.bits());
      for (int options = 0; options < 10; ++options) {
        const Output& output = kOutputs[options % 5];
        const bool corners = options % 2 == 0;
        const auto rows = linear_sources(s.height, s.out_height, {}, corners);
        auto columns = linear_sources(s.width, s.out_width, {}, corners);
        for (LinearSource& column : columns) {
          column.first_weight *= output.factor;
          column.second_weight *= output.factor;
        }
        UpsampleBilinear2dArgs args{.x = x.data(),
                                    .x_signed = options >= 5,
                                    .x_image_stride = s.height * s.width * channels,
                                    .x_row_stride = s.width * channels,
                                    .channels = channels,
                                    .out_height = s.out_height,
                                    .out_width = s.out_width,
                                    .rows = rows.data(),
                                    .columns = columns.data(),
                                    .x_zero_point = output.x_zero_point,
                                    .zero_point = output.zero_point,
                                    .lo = output.lo,
                                    .hi = output.hi};
        args.y_row_stride = s.out_width * channels + options % 3;
        args.y_image_stride = s.out_height * args.y_row_stride;
        check(args, s.batch,
              std::to_string(s.height) + "x" + std::to_string(s.width) + "x" +
                  std::to_string(channels) + ", options " + std::to_string(options));
      }
    }
  }
}

std::vector<uint8_t> output(Path path, UpsampleBilinear2dArgs args, int64_t batch, int64_t begin,
                            int64_t end) {
  Guarded<uint8_t> y(batch * args.y_image_stride, 1);
  args.y = y.data();
  run_on(path, Kernel::upsample_bilinear2d, [&] { upsample_bilinear2d(args, begin, end); });
  return y.bytes();
}

TEST_P(UpsampleBilinear2d, GivesTheReferencesBits) {
  for_each_case([&](const UpsampleBilinear2dArgs& args, int64_t batch, const std::string& text) {
    const int64_t rows = batch * args.out_height;
    const int64_t cuts[][2] = {{0, rows}, {rows / 3, rows - rows / 5}, {rows / 2, rows / 2}};
    for (const auto& cut : cuts) {
      EXPECT_EQ(output(GetParam(), args, batch, cut[0], cut[1]),
                output(Path::reference, args, batch, cut[0], cut[1]))
          << text;
    }
  });
}

TEST(UpsampleBilinear2dReference, IsWithinHalfAStepOfTheRealInterpolation) {
  for_each_case([&](UpsampleBilinear2dArgs args, int64_t batch, const std::string& text) {
    // Sums of huge terms cancel to their rounding errors.
    if (!(args.columns[0].first_weight < 10)) return;
    std::vector<uint8_t> y(batch * args.y_image_stride);
    args.y = y.data();
    run_on(Path::reference, Kernel::upsample_bilinear2d,
           [&] { upsample_bilinear2d(args, 0, batch * args.out_height); });
    const auto value = [&](int64_t n, int64_t h, int64_t w, int64_t c) {
      const uint8_t code =
          args.x[n * args.x_image_stride + h * args.x_row_stride + w * args.channels + c];
      return static_cast<double>((args.x_signed ? static_cast<int8_t>(code) : int{code}) -
                                 args.x_zero_point);
    };
    for (int64_t row = 0; row < batch * args.out_height; ++row) {
      const int64_t n = row / args.out_height, i = row % args.out_height;
      const LinearSource& r = args.rows[i];
      for (int64_t j = 0; j < args.out_width; ++j) {
        const LinearSource& c = args.columns[j];
        for (int64_t channel = 0; channel < args.channels; ++channel) {
          double real = 0;
          for (auto [h, a] : {std::pair{r.first, r.first_weight}, {r.second, r.second_weight}}) {
            for (auto [w, b] : {std::pair{c.first, c.first_weight}, {c.second, c.second_weight}}) {
              real += value(n, h, w, channel) * a * b;
            }
          }
          const double wanted = std::clamp<double>(real + args.zero_point, args.lo, args.hi);
          const uint8_t code =
              y[n * args.y_image_stride + i * args.y_row_stride + j * args.channels + channel];
          const double got = args.lo < 0 ? static_cast<int8_t>(code) : int{code};
          ASSERT_NEAR(got, wanted, 0.5001) << text;
        }
      }
    }
  });
}

TEST_P(UpsampleBilinear2d, HandComputedValues) {
  const std::vector<uint8_t> x = {10, 20, 30, 50};  // 2 x 2, one channel
  const auto rows = linear_sources(2, 3, {}, true), columns = linear_sources(2, 3, {}, true);
  std::vector<uint8_t> y(9);
  const UpsampleBilinear2dArgs args{.x = x.data(),
                                    .y = y.data(),
                                    .x_row_stride = 2,
                                    .y_row_stride = 3,
                                    .channels = 1,
                                    .out_height = 3,
                                    .out_width = 3,
                                    .rows = rows.data(),
                                    .columns = columns.data(),
                                    .x_zero_point = 10,
                                    .zero_point = 1};
  run_on(GetParam(), Kernel::upsample_bilinear2d, [&] { upsample_bilinear2d(args, 0, 3); });
  // (0 + 10 + 20 + 40) / 4 = 17.5, to even 18
  EXPECT_EQ(y, (std::vector<uint8_t>{1, 6, 11, 11, 19, 26, 21, 31, 41}));
}

}  // namespace
}  // namespace qtoolkit::kernels
