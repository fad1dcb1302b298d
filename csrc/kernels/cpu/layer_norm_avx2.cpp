#include "kernels/cpu/rounding.h"
#include "kernels/layer_norm.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/layer_norm.inl"
}  // namespace qtoolkit::kernels::avx2
