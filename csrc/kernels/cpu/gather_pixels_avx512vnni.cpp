#include "kernels/move.h"

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/gather_pixels.inl"
}  // namespace qtoolkit::kernels::avx512vnni
