#include "kernels/range_errors.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/range_errors.inl"
}  // namespace qtoolkit::kernels::portable
