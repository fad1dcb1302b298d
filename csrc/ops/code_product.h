// A product of rows of unsigned codes with a packed matrix of int8, in blocks whose int32 sums stay
// in the first or second level cache until the caller makes results of them.
#pragma once

#include <cstdint>

#include "kernels/conv2d.h"

namespace qtoolkit::ops {

// A distance between rows of `width` codes, in bytes: an odd number of cache lines, as rows at a
// power of two would share the sets of a cache.
inline int64_t spread_stride(int64_t width) { return (width + 63) / 64 * 64 | 64; }

class CodeProduct {
 public:
  struct Operands {
    const uint8_t* codes = nullptr;  // [rows, width]; of a row the last quad is read whole
    int64_t row_stride = 0;          // bytes
    int64_t rows = 0, width = 0;
    const int8_t* packed = nullptr;  // pack_conv2d_weight's of [columns, width]
    kernels::Conv2dLayout layout = kernels::Conv2dLayout::quads;
    const int8_t* weight = nullptr;  // [columns, width], for the reference path; may be absent
    int64_t columns = 0;
  };
  struct Block {
    int64_t row, rows, column, columns;
    int64_t sums() const { return rows * columns; }
  };

  explicit CodeProduct(const Operands& operands);

  // Blocks of columns are numbered within a block of rows: with few rows every thread reads a piece
  // of the packed matrix of its own, with many it has rows of its own.
  int64_t blocks() const { return row_blocks_ * parts_; }
  Block block(int64_t index) const;
  Block largest() const { return {0, rows_, 0, columns_}; }
  int64_t multiplications() const { return rows_ * columns_ * operands_.width; }  // of a block

  // sums[row * block.columns + column]
  void multiply(const Block& block, int32_t* sums) const;

 private:
  Operands operands_;
  int64_t rows_, columns_;  // of a block
  int64_t row_blocks_, parts_;
};

}  // namespace qtoolkit::ops
