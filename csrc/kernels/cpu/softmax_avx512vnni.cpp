// 64 codes at a time for the maximum, 16 for the rest: the 32 numbers of the table are two
// registers, from which a permutation picks.
#include <immintrin.h>

#include "kernels/softmax.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

__mmask64 first_of_64(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}
__mmask16 first_of_16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1);
}

uint8_t largest_of(__m512i codes) {
  __m256i a = _mm256_max_epu8(_mm512_castsi512_si256(codes), _mm512_extracti64x4_epi64(codes, 1));
  __m128i b = _mm_max_epu8(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_max_epu8(b, _mm_srli_si128(b, 8));
  // The minimum of 8 words whose lower bytes are all ones less the codes.
  b = _mm_xor_si128(_mm_max_epu8(b, _mm_srli_epi16(b, 8)), _mm_set1_epi8(-1));
  b = _mm_minpos_epu16(_mm_and_si128(b, _mm_set1_epi16(0xFF)));
  return static_cast<uint8_t>(~_mm_cvtsi128_si32(b));
}

struct Row {
  __m512 high, low;
  __m128i largest;
  const uint8_t* x;

  // table.at() of 16 codes, 0 where the mask is.
  __m512 exponentials(int64_t i, __mmask16 mask) const {
    const __m128i bytes = _mm_sub_epi8(largest, _mm_maskz_loadu_epi8(mask, x + i));
    const __m512i difference = _mm512_cvtepu8_epi32(bytes);
    // A permutation looks at the lower four bits of an index alone.
    return _mm512_maskz_mul_ps(mask, _mm512_permutexvar_ps(_mm512_srli_epi32(difference, 4), high),
                               _mm512_permutexvar_ps(difference, low));
  }
};

float sum_of(__m512 part) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(part), _mm512_extractf32x8_ps(part, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

void softmax_row(const SoftmaxArgs& args, const uint8_t* x, int64_t row) {
  const int64_t length = args.length;
  const __m512i flip = _mm512_set1_epi8(args.is_signed ? -128 : 0);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < length; i += 64) {
    const __mmask64 mask = first_of_64(length - i);
    const __m512i codes = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x + i), flip);
    largest = _mm512_mask_max_epu8(largest, mask, largest, codes);
  }
  const int flipped = largest_of(largest) ^ (args.is_signed ? 0x80 : 0);
  const Row values{_mm512_loadu_ps(args.table.high), _mm512_loadu_ps(args.table.low),
                   _mm_set1_epi8(static_cast<char>(flipped)), x};
  __m512 part = _mm512_setzero_ps();
  for (int64_t i = 0; i < length; i += 16) {
    part = _mm512_add_ps(part, values.exponentials(i, first_of_16(length - i)));
  }
  const float sum = sum_of(part);
  if (args.y_float != nullptr) {
    const __m512 factor = _mm512_set1_ps(1.0f / sum);
    float* const y = args.y_float + row * args.y_row_stride;
    for (int64_t i = 0; i < length; i += 16) {
      const __mmask16 mask = first_of_16(length - i);
      _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(values.exponentials(i, mask), factor));
    }
    return;
  }
  const __m512 factor = _mm512_set1_ps(1.0f / (sum * args.y_scale));
  const __m512 low = _mm512_set1_ps(static_cast<float>(args.lo - args.zero_point));
  const __m512 high = _mm512_set1_ps(static_cast<float>(args.hi - args.zero_point));
  const __m512i zero_point = _mm512_set1_epi32(args.zero_point);
  uint8_t* const y = args.y + row * args.y_row_stride;
  for (int64_t i = 0; i < length; i += 16) {
    const __mmask16 mask = first_of_16(length - i);
    __m512 value = _mm512_mul_ps(values.exponentials(i, mask), factor);
    const __mmask16 not_nan = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    value = _mm512_max_ps(_mm512_maskz_mov_ps(not_nan, value), low);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(value, high));
    _mm_mask_storeu_epi8(y + i, mask, _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero_point)));
  }
}

}  // namespace

void softmax(const SoftmaxArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    softmax_row(args, args.x + row * args.x_row_stride, row);
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
