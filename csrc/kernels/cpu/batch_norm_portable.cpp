#include "kernels/batch_norm.h"

#define QT_VECTOR_BYTES 16
#define QT_CHANNEL_GROUP 8  // channels whose sums are in registers at once

namespace qtoolkit::kernels::portable {
namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Doubles = double __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

// a * b + c, where a * b is exact.
inline Doubles multiply_add(const Doubles& a, const Doubles& b, const Doubles& c) {
  return a * b + c;
}

// The bits of the lanes that are -1, and back.
inline uint32_t bits_of(const Masks& masks) {
  uint32_t bits = 0;
  for (int k = 0; k < 4; ++k) bits |= static_cast<uint32_t>(masks[k] & 1) << k;
  return bits;
}
inline Masks masks_of(uint32_t bits) {
  const Masks bit = {1, 2, 4, 8};
  return ((static_cast<int32_t>(bits) - Masks{}) & bit) != 0;
}

}  // namespace
#include "kernels/cpu/batch_norm.inl"
#include "kernels/cpu/batch_norm_backward.inl"
}  // namespace qtoolkit::kernels::portable
