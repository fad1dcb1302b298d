#include "kernels/cpu/rounding.h"
#include "kernels/low_bit.h"

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/low_bit.inl"
}  // namespace qtoolkit::kernels::avx512vnni
