// Packing of matrices and sums of rows: every path against the reference, byte for byte, and the
// reference against pack_conv2d_weight.

#include "kernels/matmul.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "guarded_buffer.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

using testing::GuardedBuffer;

enum class Layout { rows, columns, neither };
constexpr Layout kLayouts[] = {Layout::rows, Layout::columns, Layout::neither};

struct Packed {
  std::vector<int8_t> bytes;
  std::vector<int32_t> sums;
  bool operator==(const Packed&) const = default;
};

class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, Layout layout, uint8_t flip)
      : rows_(rows),
        columns_(columns),
        row_stride_(layout == Layout::rows      ? columns + 3
                    : layout == Layout::columns ? 1
                                                : 2),
        column_stride_(layout == Layout::rows      ? 1
                       : layout == Layout::columns ? rows + 5
                                                   : 2 * rows + 1),
        flip_(flip),
        codes_((rows - 1) * row_stride_ + (columns - 1) * column_stride_ + 1) {
    Random random(static_cast<uint64_t>(rows * 1000 + columns));
    for (uint8_t& code : codes_) code = static_cast<uint8_t>(random.bits());
  }

  Packed packed(Path path) const {
    const int64_t blocks = (columns_ + kChannelBlock - 1) / kChannelBlock;
    GuardedBuffer<int8_t> bytes(blocks * ((rows_ + 3) / 4) * 4 * kChannelBlock, 77);
    GuardedBuffer<int32_t> sums(blocks * kChannelBlock, 77);
    const PackMatrixArgs args{.codes = codes_.data(),
                              .rows = rows_,
                              .columns = columns_,
                              .row_stride = row_stride_,
                              .column_stride = column_stride_,
                              .flip = flip_,
                              .packed = bytes.data(),
                              .sums = sums.data()};
    run_on(path, Kernel::pack_matrix, [&] {
      pack_matrix(args, 0, blocks / 2);
      pack_matrix(args, blocks / 2, blocks);
    });
    return {{bytes.begin(), bytes.end()}, {sums.begin(), sums.end()}};
  }

  // As pack_conv2d_weight has it.
  std::vector<int8_t> as_weight() const {
    std::vector<int8_t> weight;
    for (int64_t column = 0; column < columns_; ++column) {
      for (int64_t row = 0; row < rows_; ++row) {
        weight.push_back(
            static_cast<int8_t>(codes_[row * row_stride_ + column * column_stride_] ^ flip_));
      }
    }
    const Conv2dShape shape{
        .out_height = 1, .out_width = 1, .in_channels = rows_, .out_channels = columns_};
    std::vector<int8_t> result(static_cast<size_t>(shape.packed_bytes()));
    pack_conv2d_weight(Conv2dLayout::quads, shape, weight.data(), result.data());
    return result;
  }

 private:
  int64_t rows_, columns_, row_stride_, column_stride_;
  uint8_t flip_;
  GuardedBuffer<uint8_t> codes_;
};

QT_FOR_EACH_PATH(PackMatrix, pack_matrix);

TEST_P(PackMatrix, GivesTheReferencesBytesAndThoseOfAWeight) {
  for (const int64_t rows : {1, 3, 4, 5, 15, 16, 17, 31, 64, 101}) {
    for (const int64_t columns : {1, 15, 31, 32, 33, 64, 100}) {
      for (const Layout layout : kLayouts) {
        for (const uint8_t flip : {0, 0x80}) {
          const Matrix matrix(rows, columns, layout, flip);
          const Packed actual = matrix.packed(GetParam());
          const std::string text = std::to_string(rows) + " x " + std::to_string(columns) +
                                   ", layout " + std::to_string(static_cast<int>(layout));
          EXPECT_EQ(actual.bytes, matrix.as_weight()) << text;
          EXPECT_EQ(actual, matrix.packed(Path::reference)) << text;
        }
      }
    }
  }
}

QT_FOR_EACH_PATH(SumRows, sum_rows);

TEST_P(SumRows, AddsAllOfARow) {
  for (const int64_t width : {1, 15, 16, 63, 64, 65, 300, 4080, 4081, 40000}) {
    const int64_t rows = 3, stride = width + 2;
    GuardedBuffer<uint8_t> codes(rows * stride - 2, 255);
    Random random(static_cast<uint64_t>(width));
    for (int64_t i = stride; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(random.bits());
    Guarded<int32_t> sums(rows);
    const SumRowsArgs args{
        .codes = codes.data(), .width = width, .row_stride = stride, .sums = sums.data()};
    run_on(GetParam(), Kernel::sum_rows, [&] {
      sum_rows(args, 0, 1);
      sum_rows(args, 1, rows);
    });
    std::vector<int32_t> expected;
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* const from = codes.data() + row * stride;
      expected.push_back(std::accumulate(from, from + width, 0));
    }
    EXPECT_EQ(sums.values(), expected) << width;
  }
}

}  // namespace
}  // namespace qtoolkit::kernels
