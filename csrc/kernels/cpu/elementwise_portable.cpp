#include "kernels/cpu/rounding.h"
#include "kernels/elementwise.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/elementwise.inl"
}  // namespace qtoolkit::kernels::portable
