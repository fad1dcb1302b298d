// 64 codes at a time for the sums, 16 for the rest.
#include <immintrin.h>

#include "kernels/layer_norm.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

__mmask64 first_of_64(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}
__mmask16 first_of_16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1);
}

// Codes are read as unsigned, those of int8 with their highest bit turned, which adds 128.
struct Codes {
  uint8_t flip;
  int32_t offset;

  explicit Codes(bool is_signed) : flip(is_signed ? 0x80 : 0), offset(is_signed ? 128 : 0) {}
};

LayerNormRow measure(const LayerNormArgs& args, const Codes& codes, const uint8_t* x) {
  // Of so many codes the sums of a lane fit int32: 64 codes add 4 products to each.
  constexpr int64_t kBlock = 64 * 8192;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(codes.flip));
  const __m512i zero_point =
      _mm512_set1_epi16(static_cast<int16_t>(args.x_zero_point + codes.offset));
  const __m512i ones = _mm512_set1_epi16(1);
  int64_t sum = 0, squares = 0;
  for (int64_t begin = 0; begin < args.length; begin += kBlock) {
    const int64_t end = begin + kBlock < args.length ? begin + kBlock : args.length;
    __m512i lane_sums = _mm512_setzero_si512(), lane_squares = _mm512_setzero_si512();
    for (int64_t i = begin; i < end; i += 64) {
      const __mmask64 mask = first_of_64(end - i);
      const __m512i bytes = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x + i), flip);
      for (int half = 0; half < 2; ++half) {
        const __m256i part =
            half == 0 ? _mm512_castsi512_si256(bytes) : _mm512_extracti64x4_epi64(bytes, 1);
        const auto part_mask = static_cast<__mmask32>(mask >> (32 * half));
        const __m512i centred =
            _mm512_maskz_sub_epi16(part_mask, _mm512_cvtepu8_epi16(part), zero_point);
        lane_sums = _mm512_dpwssd_epi32(lane_sums, centred, ones);
        lane_squares = _mm512_dpwssd_epi32(lane_squares, centred, centred);
      }
    }
    sum += _mm512_reduce_add_epi32(lane_sums);
    const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(lane_squares));
    const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(lane_squares, 1));
    squares += _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
  }
  return layer_norm_row(args, sum, squares);
}

struct Values {
  __m512i middle;
  __m512 a, b;
  __m128i flip;
  const uint8_t* x;
  const float* weight;
  const float* bias;

  __m512 at(int64_t i, __mmask16 mask) const {
    const __m128i bytes = _mm_xor_si128(_mm_maskz_loadu_epi8(mask, x + i), flip);
    const __m512i centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), middle);
    const __m512 normal = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(centred), a), b);
    return _mm512_add_ps(_mm512_mul_ps(normal, _mm512_maskz_loadu_ps(mask, weight + i)),
                         _mm512_maskz_loadu_ps(mask, bias + i));
  }
};

}  // namespace

void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const Codes codes(args.is_signed);
  const int64_t length = args.length;
  const __m512 low = _mm512_set1_ps(static_cast<float>(args.lo - args.zero_point));
  const __m512 high = _mm512_set1_ps(static_cast<float>(args.hi - args.zero_point));
  const __m512i zero_point = _mm512_set1_epi32(args.zero_point);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* const x = args.x + row * args.x_row_stride;
    const LayerNormRow r = measure(args, codes, x);
    const Values values{_mm512_set1_epi32(r.middle + codes.offset),
                        _mm512_set1_ps(r.a),
                        _mm512_set1_ps(r.b),
                        _mm_set1_epi8(static_cast<char>(codes.flip)),
                        x,
                        args.weight,
                        args.bias};
    if (args.y_float != nullptr) {
      float* const y = args.y_float + row * args.y_row_stride;
      for (int64_t i = 0; i < length; i += 16) {
        const __mmask16 mask = first_of_16(length - i);
        _mm512_mask_storeu_ps(y + i, mask, values.at(i, mask));
      }
      continue;
    }
    uint8_t* const y = args.y + row * args.y_row_stride;
    for (int64_t i = 0; i < length; i += 16) {
      const __mmask16 mask = first_of_16(length - i);
      __m512 value = values.at(i, mask);
      const __mmask16 not_nan = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
      value = _mm512_max_ps(_mm512_maskz_mov_ps(not_nan, value), low);
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(value, high));
      _mm_mask_storeu_epi8(y + i, mask,
                           _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero_point)));
    }
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
