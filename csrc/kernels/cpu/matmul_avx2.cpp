#include <immintrin.h>

#include <cstddef>

#include "kernels/matmul.h"

#define QT_VECTOR_BYTES 32

namespace qtoolkit::kernels::avx2 {
namespace {

using Sums = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

// Two int8 times 1 do not saturate 16 bits.
inline Sums add_signed_quads(Sums acc, Sums x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)x);
  return acc + (Sums)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
inline Sums add_unsigned_bytes(Sums acc, Sums x) {
  return acc + (Sums)_mm256_sad_epu8((__m256i)x, _mm256_setzero_si256());
}
inline int32_t total(Sums acc) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128((__m256i)acc),
                              _mm256_extracti128_si256((__m256i)acc, 1));
  sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 1)));
}

}  // namespace
#include "kernels/cpu/matmul.inl"
}  // namespace qtoolkit::kernels::avx2
