#include "kernels/cpu/rounding.h"
#include "kernels/statistics.h"

#define QT_VECTOR_BYTES 64

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/statistics.inl"
}  // namespace qtoolkit::kernels::avx512vnni
