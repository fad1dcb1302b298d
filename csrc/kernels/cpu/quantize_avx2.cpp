#include "kernels/cpu/rounding.h"
#include "kernels/quantize.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/quantize.inl"
}  // namespace qtoolkit::kernels::avx2
