#include "kernels/cpu/rounding.h"
#include "kernels/low_bit.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/low_bit.inl"
}  // namespace qtoolkit::kernels::avx2
