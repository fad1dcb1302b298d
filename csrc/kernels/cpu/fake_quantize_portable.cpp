#include "kernels/fake_quantize.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::portable {
namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;

inline uint32_t bits_of(Masks lanes) {
  const Masks own = lanes & Masks{1, 2, 4, 8};
  return static_cast<uint32_t>(own[0] | own[1] | own[2] | own[3]);
}

}  // namespace
#include "kernels/cpu/fake_quantize.inl"
}  // namespace qtoolkit::kernels::portable
