// 64 codes at a time, a shorter rest with masks. Two vpermi2w look up all 128 pairs of entries that
// the low seven bits of a code can mean, for the even and for the odd codes; the highest bit
// chooses in the pair. 25 instructions; the tree of 16 vpshufb has 31 and takes 1.2 times as long,
// one load a code 4 times. (vpermi2b of AVX512-VBMI, which not every CPU of this path has, takes
// 0.35.)
#include <immintrin.h>

#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int64_t kCodes = 64;

class Table {
 public:
  explicit Table(const uint8_t* table) {
    uint8_t pairs[256];
    for (int i = 0; i < 128; ++i) {
      pairs[2 * i] = table[i];
      pairs[2 * i + 1] = table[i + 128];
    }
    for (int k = 0; k < 4; ++k) pairs_[k] = _mm512_loadu_si512(pairs + 64 * k);
  }

  __m512i operator()(__m512i codes) const {
    constexpr __mmask64 kOdd = 0xAAAAAAAAAAAAAAAA;
    // vpermi2w reads the low six bits of a word.
    const __mmask32 bit_6_of_even = _mm512_movepi16_mask(_mm512_slli_epi16(codes, 9));
    const __mmask32 bit_6_of_odd = _mm512_movepi16_mask(_mm512_slli_epi16(codes, 1));
    const __m512i even = pair(codes, bit_6_of_even);
    const __m512i odd = pair(_mm512_srli_epi16(codes, 8), bit_6_of_odd);
    const __m512i low = _mm512_mask_blend_epi8(kOdd, even, _mm512_slli_epi16(odd, 8));
    const __m512i high = _mm512_mask_blend_epi8(kOdd, _mm512_srli_epi16(even, 8), odd);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
  }

 private:
  __m512i pair(__m512i index, __mmask32 bit_6) const {
    return _mm512_mask_blend_epi16(bit_6, _mm512_permutex2var_epi16(pairs_[0], index, pairs_[1]),
                                   _mm512_permutex2var_epi16(pairs_[2], index, pairs_[3]));
  }

  __m512i pairs_[4];
};

}  // namespace

void lookup(const LookupArgs& args, int64_t begin, int64_t end) {
  const Table table(args.table);
  const auto one_row = [&](const uint8_t* x, uint8_t* y, int64_t count) {
    int64_t c = 0;
    for (; c + kCodes <= count; c += kCodes) {
      _mm512_storeu_si512(y + c, table(_mm512_loadu_si512(x + c)));
    }
    if (c < count) {
      const __mmask64 rest = (__mmask64{1} << (count - c)) - 1;
      _mm512_mask_storeu_epi8(y + c, rest, table(_mm512_maskz_loadu_epi8(rest, x + c)));
    }
  };
  if (args.x_row_stride == args.channels && args.y_row_stride == args.channels) {
    const int64_t offset = begin * args.channels;
    one_row(args.x + offset, args.y + offset, (end - begin) * args.channels);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    one_row(args.x + row * args.x_row_stride, args.y + row * args.y_row_stride, args.channels);
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
