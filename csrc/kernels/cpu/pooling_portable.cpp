#include "kernels/cpu/rounding.h"
#include "kernels/pooling.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/pooling.inl"
}  // namespace qtoolkit::kernels::portable
