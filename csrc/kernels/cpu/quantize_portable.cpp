#include "kernels/cpu/rounding.h"
#include "kernels/quantize.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/quantize.inl"
}  // namespace qtoolkit::kernels::portable
