// Float tensors that hold fake-quantized values, kept as their codes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/checks.h"

namespace qtoolkit::ops {

// Codes of x that dequantize to the very bits of x, or nothing where x holds any other value. x is
// float32 on CPU; scale and zero_point have one element, or one for each index of dimension 0.
std::optional<Tensor> exact_codes(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                  CodeRange range);

// The bits that exact_codes took in.
Tensor from_exact_codes(const Tensor& codes, const Tensor& scale, const Tensor& zero_point);

}  // namespace qtoolkit::ops
