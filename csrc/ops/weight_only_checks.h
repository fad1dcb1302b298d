// What the layers with a weight of few bits check alike.
#pragma once

#include "ops/checks.h"

namespace qtoolkit::ops {

// A weight [channels, width] as the operators get it: kernels/weight_only.h says how it lies.
struct CodedWeight {
  const Tensor& codes;
  const Tensor& scale;
  const OptionalTensor& zero_point;
  int64_t bits, group_size;
};

// Throws ValueError or TypeError that names the operator and the argument. Returns the float32
// result [..., channels], not filled.
Tensor check_weight_only(const char* op, const Tensor& x, const CodedWeight& weight,
                         const OptionalTensor& bias);

}  // namespace qtoolkit::ops
