#include "kernels/move.h"

namespace qtoolkit::kernels::reference {

void gather_pixels(const GatherPixelsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const int64_t h = args.row_from[i];
    for (int64_t j = 0; j < args.out_width; ++j) {
      const int64_t w = args.column_from[j];
      for (int64_t c = 0; c < args.channels; ++c) {
        const int64_t from = n * args.x_image_stride + h * args.x_row_stride + w * args.channels;
        args.y[n * args.y_image_stride + i * args.y_row_stride + j * args.channels + c] =
            h < 0 || w < 0 ? args.fill : args.x[from + c];
      }
    }
  }
}

void shuffle_codes(const ShuffleCodesArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.rows, i = row % args.rows;
    for (int64_t j = 0; j < args.columns; ++j) {
      const uint8_t* x =
          args.x + n * args.x_image_stride + i * args.x_row_stride + j * args.x_block_stride;
      uint8_t* y =
          args.y + n * args.y_image_stride + i * args.y_row_stride + j * args.y_block_stride;
      for (int64_t p = 0; p < args.piece_count; ++p) {
        const CodePiece& piece = args.pieces[p];
        for (int32_t w = piece.first_window; w < piece.end_window; ++w) {
          const CodeWindow& window = args.windows[w];
          for (int32_t k = 0; k < piece.size; ++k) {
            if (window.from[k] == kFromElsewhere) continue;
            y[piece.y_offset + k] = x[window.x_offset + window.from[k]];
          }
        }
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
