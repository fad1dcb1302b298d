#include "kernels/conv2d_output.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::portable {
constexpr auto store_outputs = store_conv2d_outputs;
#include "kernels/cpu/conv2d_depthwise.inl"
}  // namespace qtoolkit::kernels::portable
