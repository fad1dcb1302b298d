#include <cstddef>

#include "kernels/cpu/rounding.h"
#include "kernels/quantize_rows.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/quantize_rows.inl"
}  // namespace qtoolkit::kernels::portable
