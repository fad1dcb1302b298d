#include "kernels/range_errors.h"

#define QT_VECTOR_BYTES 64

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/range_errors.inl"
}  // namespace qtoolkit::kernels::avx512vnni
