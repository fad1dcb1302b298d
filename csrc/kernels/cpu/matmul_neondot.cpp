#include <arm_neon.h>

#include <cstddef>

#include "kernels/matmul.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::neondot {
namespace {

using Sums = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

inline Sums add_signed_quads(Sums acc, Sums x) {
  return (Sums)vdotq_s32((int32x4_t)acc, (int8x16_t)x, vdupq_n_s8(1));
}
inline Sums add_unsigned_bytes(Sums acc, Sums x) {
  return (Sums)vdotq_u32((uint32x4_t)acc, (uint8x16_t)x, vdupq_n_u8(1));
}
inline int32_t total(Sums acc) { return vaddvq_s32((int32x4_t)acc); }

}  // namespace
#include "kernels/cpu/matmul.inl"
}  // namespace qtoolkit::kernels::neondot
