#include "kernels/cpu/rounding.h"
#include "kernels/softmax.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/softmax.inl"
}  // namespace qtoolkit::kernels::avx2
