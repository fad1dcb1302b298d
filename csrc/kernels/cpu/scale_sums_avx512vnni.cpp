#include "kernels/cpu/rounding.h"
#include "kernels/scale_sums.h"

#define QT_VECTOR_BYTES 64

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/scale_sums.inl"
}  // namespace qtoolkit::kernels::avx512vnni
