#include <arm_neon.h>

#include "kernels/move.h"

namespace qtoolkit::kernels::neondot {
#include "kernels/cpu/shuffle_codes.inl"

namespace {

// The number of a piece's windows if that can be loaded and stored whole, else 0.
int32_t whole_windows(const CodePiece& piece, const CodeWindow* windows) {
  const int32_t count = piece.end_window - piece.first_window;
  bool whole = piece.size == 16;
  for (int32_t w = 0; w < count; ++w) whole = whole && windows[w].size == 16;
  return whole ? count : 0;
}

void move_piece(const CodePiece& piece, const CodeWindow* windows, const ShuffleCodesArgs& args,
                const uint8_t* x, uint8_t* y) {
  const int32_t count = whole_windows(piece, windows);
  if (count == 0) return move_codes(piece, windows, args, x, y);
  for (int64_t j = 0; j < args.columns; ++j) {
    uint8x16_t codes = vdupq_n_u8(0);
    for (int32_t w = 0; w < count; ++w) {
      // The look-up gives 0 for an index past the 16 codes, as kFromElsewhere is.
      codes =
          vorrq_u8(codes, vqtbl1q_u8(vld1q_u8(x + windows[w].x_offset), vld1q_u8(windows[w].from)));
    }
    vst1q_u8(y, codes);
    x += args.x_block_stride;
    y += args.y_block_stride;
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::neondot
