#include <immintrin.h>

#include "kernels/move.h"

namespace qtoolkit::kernels::avx2 {
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
    __m128i codes = _mm_setzero_si128();
    for (int32_t w = 0; w < count; ++w) {
      // The shuffle gives 0 where the index has its high bit set, as kFromElsewhere has.
      const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(windows[w].from));
      const auto* read = reinterpret_cast<const __m128i*>(x + windows[w].x_offset);
      codes = _mm_or_si128(codes, _mm_shuffle_epi8(_mm_loadu_si128(read), from));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), codes);
    x += args.x_block_stride;
    y += args.y_block_stride;
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::avx2
