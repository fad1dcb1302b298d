#include "kernels/cpu/rounding.h"
#include "kernels/learned.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/learned.inl"
}  // namespace qtoolkit::kernels::portable
