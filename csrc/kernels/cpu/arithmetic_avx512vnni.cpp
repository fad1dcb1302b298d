// Add and mul, 64 codes at a time. What converts and packs takes most of the time, so: a byte under
// the bits of 2^23 is a float already, packing clamps, and bounds apply to all codes at once. mul
// takes 33 instructions, 25 where b is shared.
#include <immintrin.h>

#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::avx512vnni {

#include "kernels/cpu/rows.inl"

namespace {

constexpr int64_t kCodes = 64;
using Bytes = __m512i;
using Floats = __m512;

__mmask64 first(int64_t count) { return (__mmask64{1} << count) - 1; }

Bytes load(const uint8_t* x) { return _mm512_loadu_si512(x); }
Bytes load_first(const uint8_t* x, int64_t count) {
  return _mm512_maskz_loadu_epi8(first(count), x);
}
void store(uint8_t* y, Bytes codes) { _mm512_storeu_si512(y, codes); }
void store_first(uint8_t* y, int64_t count, Bytes codes) {
  _mm512_mask_storeu_epi8(y, first(count), codes);
}
Bytes fill(uint8_t code) { return _mm512_set1_epi8(static_cast<char>(code)); }
Floats splat(float value) { return _mm512_set1_ps(value); }

// Part k holds codes 4k to 4k + 3 of each 16, the order in which packing puts four parts together.
template <bool kPlain>
class Spread {
 public:
  Spread(bool is_signed, int32_t zero_point)
      : flip_(fill(is_signed ? 128 : 0)),
        offset_(splat(static_cast<float>((1 << 23) + (is_signed ? 128 : 0) + zero_point))) {}

  void operator()(Bytes codes, Floats (&parts)[4]) const {
    if constexpr (!kPlain) codes = _mm512_xor_si512(codes, flip_);
    const Bytes magic = _mm512_castps_si512(splat(static_cast<float>(1 << 23)));
    for (int k = 0; k < 4; ++k) {
      const __m128i bytes = _mm_setr_epi32(4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3);
      const Bytes bits =
          _mm512_mask_shuffle_epi8(magic, 0x1111111111111111, codes, _mm512_broadcast_i32x4(bytes));
      parts[k] = _mm512_castsi512_ps(bits) - offset_;
    }
  }

 private:
  Bytes flip_;
  Floats offset_;
};

template <bool kPlain, bool kBounded>
class Gather {
 public:
  template <class Args>
  explicit Gather(const Args& args)
      : floor_(splat(static_cast<float>(args.lo - args.zero_point))),
        ceiling_(splat(static_cast<float>(args.hi - args.zero_point))) {
    // int8 codes are packed as codes + 128, which flips their highest bit.
    const int32_t offset = args.lo < 0 ? 128 : 0;
    zero_point_ = _mm512_set1_epi16(static_cast<int16_t>(args.zero_point + offset));
    low_ = fill(static_cast<uint8_t>(args.lo + offset));
    high_ = fill(static_cast<uint8_t>(args.hi + offset));
    flip_ = fill(static_cast<uint8_t>(offset));
  }

  Bytes operator()(const Floats (&parts)[4]) const {
    const Bytes codes = _mm512_packus_epi16(words(parts[0], parts[1]), words(parts[2], parts[3]));
    if constexpr (kPlain) return codes;
    return _mm512_xor_si512(_mm512_min_epu8(_mm512_max_epu8(codes, low_), high_), flip_);
  }

 private:
  Bytes words(Floats a, Floats b) const {
    return _mm512_adds_epi16(_mm512_packs_epi32(rounded(a), rounded(b)), zero_point_);
  }
  Bytes rounded(Floats value) const {
    if constexpr (!kBounded) {
      const __mmask16 not_nan = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
      value = _mm512_max_ps(_mm512_maskz_mov_ps(not_nan, value), floor_);
      value = _mm512_min_ps(value, ceiling_);
    }
    return _mm512_cvtps_epi32(value);
  }

  Floats floor_, ceiling_;
  Bytes zero_point_, low_, high_, flip_;
};

}  // namespace

#include "kernels/cpu/arithmetic.inl"

}  // namespace qtoolkit::kernels::avx512vnni
