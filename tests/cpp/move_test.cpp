#include "kernels/move.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/path.h"
#include "kernels/resample.h"
#include "kernels/shuffle_plan.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(GatherPixels, gather_pixels);
QT_FOR_EACH_PATH(ShuffleCodes, shuffle_codes);

using testing::GuardedBuffer;

struct Gather {
  int64_t batch, height, width;
  std::vector<int64_t> rows, columns;
};

const std::vector<Gather>& gathers() {
  static const std::vector<Gather> result = {
      {1, 1, 1, {0}, {0}},
      {2, 3, 4, nearest_sources(3, 6, {}, false), nearest_sources(4, 8, {}, false)},
      {1, 5, 7, nearest_sources(5, 8, {}, false), nearest_sources(7, 3, {}, false)},
      {3, 2, 5, padded_sources(2, 1, 2, Padding::constant),
       padded_sources(5, 3, 1, Padding::constant)},
      {1, 4, 5, padded_sources(4, 3, 2, Padding::reflect),
       padded_sources(5, 1, 4, Padding::reflect)},
      {2, 3, 3, padded_sources(3, 2, 2, Padding::replicate),
       padded_sources(3, 3, 3, Padding::replicate)},
      {1, 3, 6, padded_sources(3, -1, 2, Padding::constant),
       padded_sources(6, -2, -1, Padding::constant)},
      {2, 4, 4, {3, 3, -1, -1, 0, 2}, {-1, 2, 2, 2, 3, 0, 1, -1}}};
  return result;
}

// Rows of y are `gap` bytes further apart than they are long.
template <class Check>
void for_each_gather(Check check) {
  Random random(1);
  for (const Gather& g : gathers()) {
    for (int64_t channels : {1, 2, 3, 4, 5, 15, 16, 17, 48, 63, 64, 65, 130}) {
      for (int64_t gap : {0, 5}) {
        const std::vector<uint8_t> codes = random.codes(g.batch * g.height * g.width * channels);
        GuardedBuffer<uint8_t> x(std::ssize(codes));
        std::copy(codes.begin(), codes.end(), x.data());
        GatherPixelsArgs args;
        args.x = x.data();
        args.x_row_stride = g.width * channels;
        args.x_image_stride = g.height * args.x_row_stride;
        args.channels = channels;
        args.out_height = std::ssize(g.rows);
        args.out_width = std::ssize(g.columns);
        args.y_row_stride = args.out_width * channels + gap;
        args.y_image_stride = args.out_height * args.y_row_stride;
        args.row_from = g.rows.data();
        args.column_from = g.columns.data();
        args.fill = 77;
        check(args, g.batch,
              std::to_string(g.height) + "x" + std::to_string(g.width) + "x" +
                  std::to_string(channels) + ", gap " + std::to_string(gap));
      }
    }
  }
}

template <class Function, class Args>
std::vector<uint8_t> output(Path path, Kernel kernel, Function* function, Args args, int64_t size,
                            int64_t begin, int64_t end) {
  Guarded<uint8_t> y(size, 1);
  args.y = y.data();
  run_on(path, kernel, [&] { function(args, begin, end); });
  return y.bytes();
}

template <class Function, class Args>
void expect_reference_bits(Path path, Kernel kernel, Function* function, const Args& args,
                           int64_t size, int64_t rows, const std::string& text) {
  const int64_t cuts[][2] = {{0, rows}, {rows / 3, rows - rows / 5}, {rows / 2, rows / 2}};
  for (const auto& cut : cuts) {
    EXPECT_EQ(output(path, kernel, function, args, size, cut[0], cut[1]),
              output(Path::reference, kernel, function, args, size, cut[0], cut[1]))
        << text << ", rows " << cut[0] << " to " << cut[1];
  }
}

TEST_P(GatherPixels, GivesTheReferencesBits) {
  for_each_gather([&](const GatherPixelsArgs& args, int64_t batch, const std::string& text) {
    expect_reference_bits(GetParam(), Kernel::gather_pixels, gather_pixels, args,
                          batch * args.y_image_stride, batch * args.out_height, text);
  });
}

TEST(GatherPixelsReference, ReadsTheNamedPixel) {
  // Pixels of 2 channels: 3 across, 2 down.
  const std::vector<uint8_t> x = {0, 1, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51};
  const std::vector<int64_t> rows = {1, -1, 0}, columns = {2, -1, 0, 1};
  std::vector<uint8_t> y(3 * 4 * 2);
  GatherPixelsArgs args{.x = x.data(),
                        .y = y.data(),
                        .x_row_stride = 6,
                        .y_row_stride = 8,
                        .channels = 2,
                        .out_height = 3,
                        .out_width = 4,
                        .row_from = rows.data(),
                        .column_from = columns.data(),
                        .fill = 9};
  run_on(Path::reference, Kernel::gather_pixels, [&] { gather_pixels(args, 0, 3); });
  EXPECT_EQ(y, (std::vector<uint8_t>{50, 51, 9, 9, 30, 31, 40, 41,  //
                                     9,  9,  9, 9, 9,  9,  9,  9,   //
                                     20, 21, 9, 9, 0,  1,  10, 11}));
}

struct Shuffle {
  std::string text;
  int64_t batch, rows, columns;
  int64_t x_block, x_row, y_block, y_row;  // strides
  CodeShuffle plan;
};

std::vector<Shuffle> shuffles() {
  std::vector<Shuffle> result;
  for (auto [channels, groups] : {std::pair{6, 2},
                                  {6, 3},
                                  {32, 2},
                                  {58, 2},
                                  {116, 2},
                                  {64, 4},
                                  {240, 3},
                                  {17, 1},
                                  {17, 17},
                                  {464, 2}}) {
    result.push_back(
        {"channel shuffle " + std::to_string(channels) + " by " + std::to_string(groups), 2, 3, 5,
         channels, 5 * channels, channels, 5 * channels, channel_shuffle(channels, groups)});
  }
  for (auto [channels, factor] :
       {std::pair{1, 2}, {3, 2}, {3, 3}, {3, 4}, {5, 1}, {16, 2}, {64, 2}, {33, 3}}) {
    const int64_t block = channels * factor * factor, row = 5 * factor * channels;
    const std::string text = std::to_string(channels) + " by " + std::to_string(factor);
    result.push_back({"pixel shuffle " + text, 2, 3, 5, block, 5 * block, factor * channels,
                      factor * row, pixel_shuffle(channels, factor, row)});
    result.push_back({"pixel unshuffle " + text, 2, 3, 5, factor * channels, factor * row, block,
                      5 * block, pixel_unshuffle(channels, factor, row)});
  }
  return result;
}

ShuffleCodesArgs args_of(const Shuffle& s, const uint8_t* x) {
  return {.x = x,
          .rows = s.rows,
          .columns = s.columns,
          .x_block_stride = s.x_block,
          .x_row_stride = s.x_row,
          .x_image_stride = s.rows * s.x_row,
          .y_block_stride = s.y_block,
          .y_row_stride = s.y_row,
          .y_image_stride = s.rows * s.y_row,
          .pieces = s.plan.pieces.data(),
          .piece_count = std::ssize(s.plan.pieces),
          .windows = s.plan.windows.data()};
}

TEST_P(ShuffleCodes, GivesTheReferencesBits) {
  Random random(2);
  for (const Shuffle& s : shuffles()) {
    GuardedBuffer<uint8_t> x(s.batch * s.rows * s.x_row);
    for (uint8_t& code : x) code = static_cast<uint8_t>(random.bits());
    expect_reference_bits(GetParam(), Kernel::shuffle_codes, shuffle_codes, args_of(s, x.data()),
                          s.batch * s.rows * s.y_row, s.batch * s.rows, s.text);
  }
}

// Every code of the input arrives once, where the definition says.
TEST(ShuffleCodesReference, FollowsTheDefinitions) {
  const int64_t height = 2, width = 3, channels = 5, factor = 3;
  const int64_t wide = channels * factor * factor, row = width * factor * channels;
  Random random(3);
  const std::vector<uint8_t> x = random.codes(height * width * wide);
  const auto run = [&](const Shuffle& s, const std::vector<uint8_t>& from) {
    std::vector<uint8_t> y(from.size());
    ShuffleCodesArgs args = args_of(s, from.data());
    args.y = y.data();
    run_on(Path::reference, Kernel::shuffle_codes, [&] { shuffle_codes(args, 0, s.rows); });
    return y;
  };
  const Shuffle down = {"",
                        1,
                        height,
                        width,
                        wide,
                        width * wide,
                        factor * channels,
                        factor * row,
                        pixel_shuffle(channels, factor, row)};
  const std::vector<uint8_t> y = run(down, x);
  for (int64_t i = 0; i < height * factor; ++i) {
    for (int64_t j = 0; j < width * factor; ++j) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t from = (c * factor + i % factor) * factor + j % factor;
        EXPECT_EQ(y[i * row + j * channels + c],
                  x[(i / factor * width + j / factor) * wide + from]);
      }
    }
  }
  const Shuffle up = {"",
                      1,
                      height,
                      width,
                      factor * channels,
                      factor * row,
                      wide,
                      width * wide,
                      pixel_unshuffle(channels, factor, row)};
  EXPECT_EQ(run(up, y), x);

  const Shuffle groups = {
      "", 1, height, width, wide, width * wide, wide, width * wide, channel_shuffle(wide, factor)};
  const std::vector<uint8_t> z = run(groups, x);
  for (int64_t pixel = 0; pixel < height * width; ++pixel) {
    for (int64_t g = 0; g < factor; ++g) {
      for (int64_t c = 0; c < wide / factor; ++c) {
        EXPECT_EQ(z[pixel * wide + c * factor + g], x[pixel * wide + g * (wide / factor) + c]);
      }
    }
  }
}

TEST(ShufflePlan, ReadsOnlyCodesOfTheBlock) {
  for (const Shuffle& s : shuffles()) {
    int64_t moved = 0;
    for (const CodePiece& piece : s.plan.pieces) {
      for (int32_t w = piece.first_window; w < piece.end_window; ++w) {
        const CodeWindow& window = s.plan.windows[w];
        ASSERT_LE(window.size, 16);
        for (int32_t k = 0; k < 16; ++k) {
          if (window.from[k] == kFromElsewhere) continue;
          ASSERT_LT(window.from[k], window.size) << s.text;
          ASSERT_LT(k, piece.size) << s.text;
          ++moved;
        }
      }
    }
    const int64_t codes = s.x_block * (s.x_row / s.x_block / 5);
    EXPECT_EQ(moved, codes) << s.text;
  }
}

TEST(Sources, OfPadding) {
  using V = std::vector<int64_t>;
  EXPECT_EQ(padded_sources(3, 2, 1, Padding::constant), (V{-1, -1, 0, 1, 2, -1}));
  EXPECT_EQ(padded_sources(3, 2, 1, Padding::reflect), (V{2, 1, 0, 1, 2, 1}));
  EXPECT_EQ(padded_sources(3, 2, 1, Padding::replicate), (V{0, 0, 0, 1, 2, 2}));
  EXPECT_EQ(padded_sources(3, 2, 1, Padding::circular), (V{1, 2, 0, 1, 2, 0}));
  EXPECT_EQ(padded_sources(4, -1, -2, Padding::reflect), (V{1}));
}

TEST(Sources, OfNearestUpsampling) {
  using V = std::vector<int64_t>;
  EXPECT_EQ(nearest_sources(2, 4, {}, false), (V{0, 0, 1, 1}));
  EXPECT_EQ(nearest_sources(3, 2, {}, false), (V{0, 1}));
  EXPECT_EQ(nearest_sources(3, 2, {}, true), (V{0, 2}));
  EXPECT_EQ(nearest_sources(3, 4, 1.5, false), (V{0, 0, 1, 2}));
}

TEST(Sources, OfLinearInterpolation) {
  const auto corners = linear_sources(2, 3, {}, true);
  EXPECT_EQ(corners[1].first, 0);
  EXPECT_EQ(corners[1].second, 1);
  EXPECT_EQ(corners[1].first_weight, 0.5f);
  EXPECT_EQ(corners[2].first, 1);
  EXPECT_EQ(corners[2].second, 1);
  const auto middles = linear_sources(2, 4, {}, false);
  const float weights[] = {0.0f, 0.25f, 0.75f, 0.25f};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(middles[i].second_weight, weights[i]) << i;
  EXPECT_EQ(middles[3].second, 1);
  for (const LinearSource& same : linear_sources(5, 5, 3.0, false)) {
    EXPECT_EQ(same.first_weight, 1.0f);
    EXPECT_EQ(same.second_weight, 0.0f);
  }
}

}  // namespace
}  // namespace qtoolkit::kernels
