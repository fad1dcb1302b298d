#include <immintrin.h>

#include "kernels/fake_quantize.h"

#define QT_VECTOR_BYTES 32

namespace qtoolkit::kernels::avx2 {
namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;

inline uint32_t bits_of(Masks lanes) {
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
}

}  // namespace
#include "kernels/cpu/fake_quantize.inl"
}  // namespace qtoolkit::kernels::avx2
