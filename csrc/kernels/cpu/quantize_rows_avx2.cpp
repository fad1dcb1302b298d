#include <cstddef>

#include "kernels/cpu/rounding.h"
#include "kernels/quantize_rows.h"

#define QT_VECTOR_BYTES 32

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/quantize_rows.inl"
}  // namespace qtoolkit::kernels::avx2
