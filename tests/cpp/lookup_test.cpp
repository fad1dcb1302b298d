#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "kernels/elementwise.h"
#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(Lookup, lookup);

struct Rows {
  int64_t rows, channels, x_gap, y_gap;
};
const Rows kRows[] = {{0, 5, 0, 0},   {1, 1, 0, 0},    {7, 3, 0, 0},   {5, 31, 2, 0},
                      {4, 33, 0, 3},  {3, 63, 1, 1},   {3, 64, 0, 0},  {2, 65, 0, 64},
                      {2, 128, 5, 0}, {1, 1000, 0, 0}, {300, 1, 0, 0}, {50, 24, 0, 40}};

LookupArgs args_of(const Rows& rows) {
  LookupArgs args;
  args.channels = rows.channels;
  args.x_row_stride = rows.channels + rows.x_gap;
  args.y_row_stride = rows.channels + rows.y_gap;
  return args;
}

TEST_P(Lookup, GivesTheReferencesBits) {
  Random random(1);
  for (const Rows& rows : kRows) {
    LookupArgs args = args_of(rows);
    const std::vector<uint8_t> table = random.codes(256);
    const std::vector<uint8_t> x = random.codes(rows.rows * args.x_row_stride);
    args.x = x.data();
    args.table = table.data();
    const int64_t cuts[][2] = {{0, rows.rows}, {rows.rows / 3, rows.rows - rows.rows / 5}};
    for (const auto& cut : cuts) {
      Guarded<uint8_t> expected(rows.rows * args.y_row_stride, 1);
      Guarded<uint8_t> actual(rows.rows * args.y_row_stride, 1);
      args.y = expected.data();
      run_on(Path::reference, Kernel::lookup, [&] { lookup(args, cut[0], cut[1]); });
      args.y = actual.data();
      run_on(GetParam(), Kernel::lookup, [&] { lookup(args, cut[0], cut[1]); });
      EXPECT_EQ(actual.bytes(), expected.bytes()) << rows.rows << " rows of " << rows.channels;
    }
  }
}

TEST_P(Lookup, FindsEveryEntryAtEveryPlace) {
  Random random(2);
  const std::vector<uint8_t> table = random.codes(256);
  std::vector<uint8_t> x(256), y(256);
  LookupArgs args;
  args.x = x.data();
  args.y = y.data();
  args.table = table.data();
  args.channels = args.x_row_stride = args.y_row_stride = 256;
  for (int shift = 0; shift < 256; ++shift) {
    for (int i = 0; i < 256; ++i) x[i] = static_cast<uint8_t>(i + shift);
    run_on(GetParam(), Kernel::lookup, [&] { lookup(args, 0, 1); });
    for (int i = 0; i < 256; ++i) ASSERT_EQ(y[i], table[(i + shift) % 256]) << i << ", " << shift;
  }
}

TEST_P(Lookup, WorksInPlace) {
  Random random(3);
  std::vector<uint8_t> table(256);
  std::iota(table.rbegin(), table.rend(), 0);  // 255 - code
  const std::vector<uint8_t> x = random.codes(1001);
  std::vector<uint8_t> y = x;
  LookupArgs args;
  args.x = args.y = y.data();
  args.table = table.data();
  args.channels = args.x_row_stride = args.y_row_stride = 143;
  run_on(GetParam(), Kernel::lookup, [&] { lookup(args, 0, 7); });
  for (int i = 0; i < 1001; ++i) ASSERT_EQ(y[i], 255 - x[i]) << i;
}

TEST_P(Lookup, ReadsNothingBeyondItsRows) {
  qtoolkit::testing::GuardedBuffer<uint8_t> table(256, 7), x(3 * 77, 200), y(3 * 77);
  LookupArgs args;
  args.x = x.data();
  args.y = y.data();
  args.table = table.data();
  args.channels = args.x_row_stride = args.y_row_stride = 77;
  run_on(GetParam(), Kernel::lookup, [&] { lookup(args, 0, 3); });
  for (uint8_t code : y) ASSERT_EQ(code, 7);
}

}  // namespace
}  // namespace qtoolkit::kernels
