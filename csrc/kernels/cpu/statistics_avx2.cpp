#include "kernels/cpu/rounding.h"
#include "kernels/statistics.h"

#define QT_VECTOR_BYTES 32

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/statistics.inl"
}  // namespace qtoolkit::kernels::avx2
