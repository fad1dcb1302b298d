#include "kernels/range_errors.h"

#define QT_VECTOR_BYTES 32

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/range_errors.inl"
}  // namespace qtoolkit::kernels::avx2
