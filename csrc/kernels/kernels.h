// Declares every kernel and every path of it: qtoolkit::kernels::<path>::<kernel>.
#pragma once

#include "kernels/batch_norm.h"
#include "kernels/conv2d.h"
#include "kernels/convert.h"
#include "kernels/elementwise.h"
#include "kernels/fake_quantize.h"
#include "kernels/layer_norm.h"
#include "kernels/learned.h"
#include "kernels/low_bit.h"
#include "kernels/matmul.h"
#include "kernels/move.h"
#include "kernels/pooling.h"
#include "kernels/pooling_train.h"
#include "kernels/quantize.h"
#include "kernels/quantize_image.h"
#include "kernels/quantize_rows.h"
#include "kernels/range_errors.h"
#include "kernels/scale_sums.h"
#include "kernels/softmax.h"
#include "kernels/statistics.h"
#include "kernels/upsample.h"
#include "kernels/weight_only.h"

namespace qtoolkit::kernels {

#define QT_KERNEL(kernel, Args) using kernel##_function = void(const Args&, int64_t, int64_t);
#include "kernels/kernels.inc"
#undef QT_KERNEL

#define QT_KERNEL_PATH(kernel, path) \
  namespace path {                   \
  kernel##_function kernel;          \
  }
#include "kernels/kernels.inc"
#undef QT_KERNEL_PATH

}  // namespace qtoolkit::kernels
