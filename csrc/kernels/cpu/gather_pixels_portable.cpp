#include "kernels/move.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/gather_pixels.inl"
}  // namespace qtoolkit::kernels::portable
