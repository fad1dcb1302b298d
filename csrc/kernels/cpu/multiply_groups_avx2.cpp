#include <cstddef>

#include "kernels/weight_only.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/multiply_groups.inl"
}  // namespace qtoolkit::kernels::avx2
