#include <cstddef>

#include "kernels/cpu/rounding.h"
#include "kernels/weight_only.h"

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/quantize_groups.inl"
}  // namespace qtoolkit::kernels::avx512vnni
