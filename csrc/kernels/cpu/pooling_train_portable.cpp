#include "kernels/pooling_train.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/pooling_train.inl"
}  // namespace qtoolkit::kernels::portable
