// Weights packed for the kernels. The packed form, the offsets and the multipliers are derived from
// plain tensors and kept in the process, so that operators stay functions of plain tensors.
#pragma once

#include <memory>
#include <vector>

#include "kernels/conv2d.h"
#include "ops/checks.h"

namespace qtoolkit::ops {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

struct PackedWeight {
  Tensor canonical;  // contiguous; set only if the weight itself is not
  std::unique_ptr<int8_t, FreeDeleter> packed;
  std::vector<int32_t> offset;
  std::vector<float> multiplier;
};

// All that a packed weight depends on.
struct WeightRequest {
  const char* op;
  const Tensor& weight;               // int8 [groups * out_channels, in_channels, ...]
  const Tensor& weight_scale;         // float32 [groups * out_channels] or [1], contiguous
  const Tensor* bias;                 // int32 [groups * out_channels], contiguous, or nullptr
  const kernels::Conv2dShape& shape;  // the output's size does not matter
  bool depthwise = false;
  float x_scale = 1.0f;
  int32_t x_zero_point = 0;  // of unsigned codes
  float y_scale = 1.0f;      // 1 for float output
};

// Packs, or returns what was packed before for an equal request. An entry lives as long as its
// weight. It is found by the weight's identity and holds if the weight's version (autograd's count
// of in-place changes), its address and a sample of its bytes are the same: the sample serves
// tensors that count no versions (inference tensors, `.data`), where a change of a few elements
// can go unseen. weight_scale and bias are compared by value.
std::shared_ptr<const PackedWeight> packed_weight(const WeightRequest& request);

}  // namespace qtoolkit::ops
