#include "kernels/move.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/shuffle_codes.inl"

namespace {

void move_piece(const CodePiece& piece, const CodeWindow* windows, const ShuffleCodesArgs& args,
                const uint8_t* x, uint8_t* y) {
  move_codes(piece, windows, args, x, y);
}

}  // namespace
}  // namespace qtoolkit::kernels::portable
