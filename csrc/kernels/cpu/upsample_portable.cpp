#include "kernels/cpu/rounding.h"
#include "kernels/upsample.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/upsample.inl"
}  // namespace qtoolkit::kernels::portable
