// What the paths of shuffle_codes share: the including file opens the path's namespace and defines
// move_piece, which moves one piece of every block in a row. No include guard and no includes, on
// purpose.

namespace {

void move_piece(const CodePiece& piece, const CodeWindow* windows, const ShuffleCodesArgs& args,
                const uint8_t* x, uint8_t* y);

// The same, code by code.
[[maybe_unused]] void move_codes(const CodePiece& piece, const CodeWindow* windows,
                                 const ShuffleCodesArgs& args, const uint8_t* x, uint8_t* y) {
  const int32_t count = piece.end_window - piece.first_window;
  int64_t from[16] = {};
  for (int32_t w = 0; w < count; ++w) {
    for (int32_t k = 0; k < piece.size; ++k) {
      if (windows[w].from[k] != kFromElsewhere) from[k] = windows[w].x_offset + windows[w].from[k];
    }
  }
  for (int64_t j = 0; j < args.columns; ++j) {
    for (int32_t k = 0; k < piece.size; ++k) y[k] = x[from[k]];
    x += args.x_block_stride;
    y += args.y_block_stride;
  }
}

}  // namespace

// args is a copy, which a store of bytes cannot change.
void shuffle_codes(const ShuffleCodesArgs& shared, int64_t begin, int64_t end) {
  const ShuffleCodesArgs args = shared;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.rows, i = row % args.rows;
    const uint8_t* const x = args.x + n * args.x_image_stride + i * args.x_row_stride;
    uint8_t* const y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    for (int64_t p = 0; p < args.piece_count; ++p) {
      const CodePiece& piece = args.pieces[p];
      move_piece(piece, args.windows + piece.first_window, args, x, y + piece.y_offset);
    }
  }
}
