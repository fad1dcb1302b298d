#include <cstddef>

#include "kernels/weight_only.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/multiply_groups.inl"
}  // namespace qtoolkit::kernels::portable
