// What the operators of straight-through fake-quantization share.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/fake_quantize.h"
#include "ops/checks.h"
#include "ops/layout.h"

namespace qtoolkit::ops {

// An uninitialized 1-bit mask for x: uint8 [ceil(numel / 8)].
inline Tensor empty_mask(const Tensor& x) {
  return empty_beside(x, {(x.sym_numel() + 7) / 8}, at::kByte, at::MemoryFormat::Contiguous);
}

// Writes y, dense and of the type and layout of x, and the mask if it is defined. args needs
// parameters only.
void fake_quantize_into(const Tensor& y, const Tensor& mask, const Tensor& x,
                        kernels::FakeQuantizeArgs args);

}  // namespace qtoolkit::ops
