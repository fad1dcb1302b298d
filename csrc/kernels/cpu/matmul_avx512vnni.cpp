#include <immintrin.h>

#include <cstddef>

#include "kernels/matmul.h"

#define QT_VECTOR_BYTES 64

namespace qtoolkit::kernels::avx512vnni {
namespace {

using Sums = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

inline Sums add_signed_quads(Sums acc, Sums x) {
  return (Sums)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi8(1), (__m512i)x);
}
inline Sums add_unsigned_bytes(Sums acc, Sums x) {
  return (Sums)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)x, _mm512_set1_epi8(1));
}
inline int32_t total(Sums acc) { return _mm512_reduce_add_epi32((__m512i)acc); }

}  // namespace
#include "kernels/cpu/matmul.inl"
}  // namespace qtoolkit::kernels::avx512vnni
