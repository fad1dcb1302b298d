#include "kernels/matmul.h"

namespace qtoolkit::kernels::reference {

void pack_matrix(const PackMatrixArgs& args, int64_t begin, int64_t end) {
  const int64_t quads = (args.rows + 3) / 4;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
      const int64_t column = block * kChannelBlock + lane;
      int32_t sum = 0;
      for (int64_t row = 0; row < 4 * quads; ++row) {
        int8_t value = 0;
        if (row < args.rows && column < args.columns) {
          value = static_cast<int8_t>(
              args.codes[row * args.row_stride + column * args.column_stride] ^ args.flip);
        }
        args.packed[((block * quads + row / 4) * kChannelBlock + lane) * 4 + row % 4] = value;
        sum += value;
      }
      args.sums[column] = sum;
    }
  }
}

void sum_rows(const SumRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    int32_t sum = 0;
    for (int64_t i = 0; i < args.width; ++i) sum += args.codes[row * args.row_stride + i];
    args.sums[row] = sum;
  }
}

}  // namespace qtoolkit::kernels::reference
