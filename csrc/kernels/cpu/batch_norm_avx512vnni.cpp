#include <immintrin.h>

#include "kernels/batch_norm.h"

#define QT_VECTOR_BYTES 64
#define QT_CHANNEL_GROUP 64  // channels whose sums are in registers at once

namespace qtoolkit::kernels::avx512vnni {
namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Doubles = double __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

// a * b + c, where a * b is exact.
inline Doubles multiply_add(const Doubles& a, const Doubles& b, const Doubles& c) {
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}

// The bits of the lanes that are -1, and back.
inline uint32_t bits_of(const Masks& masks) { return _mm512_movepi32_mask((__m512i)masks); }
inline Masks masks_of(uint32_t bits) {
  return (Masks)_mm512_movm_epi32(static_cast<__mmask16>(bits));
}

}  // namespace
#include "kernels/cpu/batch_norm.inl"
#include "kernels/cpu/batch_norm_backward.inl"
}  // namespace qtoolkit::kernels::avx512vnni
