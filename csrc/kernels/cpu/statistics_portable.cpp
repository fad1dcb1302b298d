#include "kernels/cpu/rounding.h"
#include "kernels/statistics.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/statistics.inl"
}  // namespace qtoolkit::kernels::portable
