#include "kernels/cpu/rounding.h"
#include "kernels/elementwise.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/elementwise.inl"
}  // namespace qtoolkit::kernels::avx2
