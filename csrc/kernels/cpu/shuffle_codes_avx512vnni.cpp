#include <immintrin.h>

#include "kernels/move.h"

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/shuffle_codes.inl"

namespace {

inline __mmask16 first(int32_t count) { return static_cast<__mmask16>((1u << count) - 1); }

struct Window {
  const uint8_t* x;
  __m128i from;
  __mmask16 mask;

  Window(const CodeWindow& window, const uint8_t* x)
      : x(x + window.x_offset),
        from(_mm_loadu_si128(reinterpret_cast<const __m128i*>(window.from))),
        mask(first(window.size)) {}
  // Its codes of the block at that offset, 0 in place of the others: the shuffle gives 0 where the
  // index has its high bit set, as kFromElsewhere has.
  __m128i codes(int64_t offset) const {
    return _mm_shuffle_epi8(_mm_maskz_loadu_epi8(mask, x + offset), from);
  }
};

// With so many windows, which stay in registers.
template <int... kWindow>
void move_piece(const CodePiece& piece, const CodeWindow* windows, const ShuffleCodesArgs& args,
                const uint8_t* x, uint8_t* y) {
  const Window window[] = {Window(windows[kWindow], x)...};
  const __mmask16 mask = first(piece.size);
  int64_t offset = 0;
  for (int64_t j = 0; j < args.columns; ++j) {
    __m128i codes = _mm_setzero_si128();
    ((codes = _mm_or_si128(codes, window[kWindow].codes(offset))), ...);
    _mm_mask_storeu_epi8(y, mask, codes);
    offset += args.x_block_stride;
    y += args.y_block_stride;
  }
}

void move_piece(const CodePiece& piece, const CodeWindow* windows, const ShuffleCodesArgs& args,
                const uint8_t* x, uint8_t* y) {
  const int32_t count = piece.end_window - piece.first_window;
  switch (count) {
    case 1:
      return move_piece<0>(piece, windows, args, x, y);
    case 2:
      return move_piece<0, 1>(piece, windows, args, x, y);
    case 3:
      return move_piece<0, 1, 2>(piece, windows, args, x, y);
    case 4:
      return move_piece<0, 1, 2, 3>(piece, windows, args, x, y);
    default:
      break;
  }
  int64_t offset = 0;
  for (int64_t j = 0; j < args.columns; ++j) {
    __m128i codes = _mm_setzero_si128();
    for (int32_t w = 0; w < count; ++w) {
      codes = _mm_or_si128(codes, Window(windows[w], x).codes(offset));
    }
    _mm_mask_storeu_epi8(y, first(piece.size), codes);
    offset += args.x_block_stride;
    y += args.y_block_stride;
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
