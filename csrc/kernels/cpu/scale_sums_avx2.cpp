#include "kernels/cpu/rounding.h"
#include "kernels/scale_sums.h"

#define QT_VECTOR_BYTES 32

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/scale_sums.inl"
}  // namespace qtoolkit::kernels::avx2
