#include "kernels/cpu/rounding.h"
#include "kernels/scale_sums.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/scale_sums.inl"
}  // namespace qtoolkit::kernels::portable
