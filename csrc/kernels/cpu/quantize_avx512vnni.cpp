#include "kernels/cpu/rounding.h"
#include "kernels/quantize.h"

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/quantize.inl"
}  // namespace qtoolkit::kernels::avx512vnni
