#include "ops/code_product.h"

#include <algorithm>
#include <array>

#include "kernels/kernels.h"

namespace qtoolkit::ops {
namespace {

// As many rows as fill this much of a second level cache are multiplied with a part of the matrix
// before the next rows come.
constexpr int64_t kBlockBytes = int64_t{1} << 20;
constexpr int64_t kMostSums = 16384;  // but for a block of kChannelBlock columns
constexpr int64_t kMostColumns = 4 * kernels::kChannelBlock;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

CodeProduct::CodeProduct(const Operands& operands)
    : operands_(operands),
      rows_(std::min(operands.rows,
                     std::max(kBlockBytes / operands.width, 2 * kernels::kTilePixels))),
      columns_(std::clamp(kMostSums / rows_ / kernels::kChannelBlock * kernels::kChannelBlock,
                          kernels::kChannelBlock, kMostColumns)),
      row_blocks_(divided_up(operands.rows, rows_)),
      parts_(divided_up(operands.columns, columns_)) {}

CodeProduct::Block CodeProduct::block(int64_t index) const {
  const int64_t row = index / parts_ * rows_;
  const int64_t column = index % parts_ * columns_;
  return {row, std::min(rows_, operands_.rows - row), column,
          std::min(columns_, operands_.columns - column)};
}

void CodeProduct::multiply(const Block& block, int32_t* sums) const {
  static constexpr std::array<int32_t, kMostColumns> kNoOffset{};
  static constexpr std::array<float, kMostColumns> kNoMultiplier{};
  kernels::Conv2dArgs args;
  args.shape = {.out_height = 1,
                .out_width = block.rows,
                .in_channels = operands_.width,
                .out_channels = block.columns};
  args.x = operands_.codes + block.row * operands_.row_stride;
  args.x_pixel_stride = operands_.row_stride;
  args.x_row_stride = block.rows * operands_.row_stride;
  args.layout = operands_.layout;
  args.packed = kernels::conv2d_packed_block(args.layout, args.shape, operands_.packed,
                                             block.column / kernels::kChannelBlock);
  if (operands_.weight != nullptr) {
    args.weight = operands_.weight + block.column * operands_.width;
  }
  args.offset = kNoOffset.data();
  args.multiplier = kNoMultiplier.data();
  args.output = kernels::Conv2dOutput::int32;
  args.y = sums;
  args.y_pixel_stride = block.columns;
  args.y_row_stride = block.sums();
  kernels::conv2d(args, 0, kernels::conv2d_units(args.shape));
}

}  // namespace qtoolkit::ops
