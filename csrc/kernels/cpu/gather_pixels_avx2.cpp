#include "kernels/move.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/gather_pixels.inl"
}  // namespace qtoolkit::kernels::avx2
