#include "kernels/cpu/rounding.h"
#include "kernels/quantize_image.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/quantize_image.inl"
}  // namespace qtoolkit::kernels::avx2
