#include "kernels/cpu/rounding.h"
#include "kernels/softmax.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/softmax.inl"
}  // namespace qtoolkit::kernels::portable
