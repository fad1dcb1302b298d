#include "kernels/pooling_train.h"

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/pooling_train.inl"
}  // namespace qtoolkit::kernels::avx512vnni
