// Float tensors that hold fake-quantized values, kept as their codes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ops/checks.h"

namespace qtoolkit::ops {

// Codes of x that dequantize to the very bits of x, or nothing where x holds any other value. x is
// float32 on CPU; scale and zero_point have one element each, or one for each index of dimension 0,
// and are valid for the range (else there are no codes).
std::optional<Tensor> exact_codes(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                  CodeRange range);

// The bits that exact_codes took in.
Tensor from_exact_codes(const Tensor& codes, const Tensor& scale, const Tensor& zero_point);

// The arguments of conv2d_train that say which codes may be kept.
void check_code_arguments(const Tensor& x, const OptionalTensor& x_scale,
                          const OptionalTensor& x_zero_point, int64_t x_quant_min,
                          int64_t x_quant_max, const Tensor& weight,
                          const OptionalTensor& weight_scale, int64_t weight_quant_max);

}  // namespace qtoolkit::ops
