#include <cstddef>

#include "kernels/matmul.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::portable {
namespace {

using Sums = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

inline Sums add_signed_quads(Sums acc, Sums x) {
  return acc + (x << 24 >> 24) + (x << 16 >> 24) + (x << 8 >> 24) + (x >> 24);
}
inline Sums add_unsigned_bytes(Sums acc, Sums x) {
  return acc + (x & 0xff) + (x >> 8 & 0xff) + (x >> 16 & 0xff) + (x >> 24 & 0xff);
}
inline int32_t total(Sums acc) { return acc[0] + acc[1] + acc[2] + acc[3]; }

}  // namespace
#include "kernels/cpu/matmul.inl"
}  // namespace qtoolkit::kernels::portable
