// What a product of two matrices of codes needs beside the convolution kernel, which multiplies.
#pragma once

#include <cstdint>

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// The right matrix [rows, columns] as the weight [columns, rows] is packed in quads, and the sums
// of its columns. `codes ^ flip` are the int8 numbers: flip is 0 for int8 codes, and 0x80 for uint8
// codes, which become 128 less. begin and end count blocks of kChannelBlock columns. Fastest where
// one of the strides is 1.
struct PackMatrixArgs {
  const uint8_t* codes = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 0;  // bytes
  uint8_t flip = 0;
  int8_t* packed = nullptr;  // [blocks][ceil(rows / 4)][kChannelBlock][4]
  int32_t* sums = nullptr;   // [blocks * kChannelBlock], 0 after the last column
};
void pack_matrix(const PackMatrixArgs& args, int64_t begin, int64_t end);

// Sums of rows of unsigned codes. begin and end count rows.
struct SumRowsArgs {
  const uint8_t* codes = nullptr;
  int64_t width = 0, row_stride = 0;
  int32_t* sums = nullptr;  // [rows]
};
void sum_rows(const SumRowsArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
