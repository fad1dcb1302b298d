// Statistics that several operators need.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/value_range.h"

namespace qtoolkit::ops {

// The least and greatest value of a CPU tensor of floats, both NaN if it holds a NaN. The tensor
// must not be empty.
ValueRange range_of(const at::Tensor& x);

}  // namespace qtoolkit::ops
