#include "kernels/cpu/rounding.h"
#include "kernels/learned.h"

#define QT_VECTOR_BYTES 64

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/learned.inl"
}  // namespace qtoolkit::kernels::avx512vnni
