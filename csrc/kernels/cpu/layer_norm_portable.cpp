#include "kernels/cpu/rounding.h"
#include "kernels/layer_norm.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/layer_norm.inl"
}  // namespace qtoolkit::kernels::portable
