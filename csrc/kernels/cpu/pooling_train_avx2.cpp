#include "kernels/pooling_train.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/pooling_train.inl"
}  // namespace qtoolkit::kernels::avx2
