#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/batch_norm.h"

#define QT_VECTOR_BYTES 16
#define QT_CHANNEL_GROUP 16  // channels whose sums are in registers at once

namespace qtoolkit::kernels::portable {
namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

// The bits of the lanes that are -1, and back.
inline uint32_t bits_of(const Masks& masks) {
#if defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)masks));
#else
  uint32_t bits = 0;
  for (int k = 0; k < 4; ++k) bits |= static_cast<uint32_t>(masks[k] & 1) << k;
  return bits;
#endif
}
inline Masks masks_of(uint32_t bits) {
  const Masks bit = {1, 2, 4, 8};
  return ((static_cast<int32_t>(bits) - Masks{}) & bit) != 0;
}

}  // namespace
#include "kernels/cpu/batch_norm.inl"
}  // namespace qtoolkit::kernels::portable
