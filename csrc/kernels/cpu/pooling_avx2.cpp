#include "kernels/cpu/rounding.h"
#include "kernels/pooling.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/pooling.inl"
}  // namespace qtoolkit::kernels::avx2
