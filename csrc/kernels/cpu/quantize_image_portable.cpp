#include "kernels/cpu/rounding.h"
#include "kernels/quantize_image.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/quantize_image.inl"
}  // namespace qtoolkit::kernels::portable
