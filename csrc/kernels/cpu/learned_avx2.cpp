#include "kernels/cpu/rounding.h"
#include "kernels/learned.h"

#define QT_VECTOR_BYTES 32

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/learned.inl"
}  // namespace qtoolkit::kernels::avx2
