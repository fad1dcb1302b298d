#include <immintrin.h>

#include "kernels/fake_quantize.h"

#define QT_VECTOR_BYTES 64

namespace qtoolkit::kernels::avx512vnni {
namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;

inline uint32_t bits_of(Masks lanes) {
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
}

}  // namespace
#include "kernels/cpu/fake_quantize.inl"
}  // namespace qtoolkit::kernels::avx512vnni
