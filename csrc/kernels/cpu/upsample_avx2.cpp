#include "kernels/cpu/rounding.h"
#include "kernels/upsample.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/upsample.inl"
}  // namespace qtoolkit::kernels::avx2
