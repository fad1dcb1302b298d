#include "kernels/cpu/conv2d_output_avx2.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/conv2d_depthwise.inl"
}  // namespace qtoolkit::kernels::avx2
