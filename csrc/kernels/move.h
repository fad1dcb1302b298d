// Kernels that only move 8-bit codes, in NHWC: nearest upsampling and padding move whole pixels,
// channel and pixel shuffle move the codes of blocks.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Output pixel (i, j) is input pixel (row_from[i], column_from[j]), or `fill` in every channel
// where one of them is negative. Units of work are output rows, flat over batch * out_height.
struct GatherPixelsArgs {
  const uint8_t* x = nullptr;
  uint8_t* y = nullptr;
  // Bytes; a row's pixels lie side by side.
  int64_t x_image_stride = 0, x_row_stride = 0;
  int64_t y_image_stride = 0, y_row_stride = 0;
  int64_t channels = 0;
  int64_t out_height = 0, out_width = 0;
  const int64_t* row_from = nullptr;     // [out_height]
  const int64_t* column_from = nullptr;  // [out_width]
  uint8_t fill = 0;
};
void gather_pixels(const GatherPixelsArgs& args, int64_t begin, int64_t end);

// Up to 16 codes of a block that lie side by side in the output, and the windows that they come
// from (see kernels/shuffle_plan.h).
struct CodePiece {
  int64_t y_offset;
  int32_t size;
  int32_t first_window, end_window;
};
// Up to 16 input codes side by side. Code k of the piece is the from[k]-th of them, or, where
// from[k] is kFromElsewhere, lies in another window.
struct CodeWindow {
  int64_t x_offset;
  int32_t size;
  uint8_t from[16];
};
inline constexpr uint8_t kFromElsewhere = 0x80;

// The same rearrangement of every block of codes. Units of work are rows of blocks, flat over
// batch * rows.
struct ShuffleCodesArgs {
  const uint8_t* x = nullptr;
  uint8_t* y = nullptr;
  int64_t rows = 0, columns = 0;  // blocks of an image
  // Bytes from a block to the one right of it, below it, and in the next image.
  int64_t x_block_stride = 0, x_row_stride = 0, x_image_stride = 0;
  int64_t y_block_stride = 0, y_row_stride = 0, y_image_stride = 0;
  const CodePiece* pieces = nullptr;
  int64_t piece_count = 0;
  const CodeWindow* windows = nullptr;
};
void shuffle_codes(const ShuffleCodesArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
