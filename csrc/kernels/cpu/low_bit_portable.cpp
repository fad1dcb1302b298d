#include "kernels/cpu/rounding.h"
#include "kernels/low_bit.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/low_bit.inl"
}  // namespace qtoolkit::kernels::portable
