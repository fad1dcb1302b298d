// Between float32 and the 16-bit floats, for kernels that compute in float32 block by block.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Rounded half to even, with subnormals; beyond the largest number infinity. A NaN keeps its sign
// and the upper bits of its payload, and becomes quiet (but not from bfloat16).
struct ConvertArgs {
  bool bfloat16 = false;              // else float16 (IEEE 754 binary16)
  const uint16_t* half_in = nullptr;  // to_float
  float* float_out = nullptr;
  const float* float_in = nullptr;  // from_float
  uint16_t* half_out = nullptr;
};
void to_float(const ConvertArgs& args, int64_t begin, int64_t end);
void from_float(const ConvertArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
