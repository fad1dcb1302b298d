// What conv2d and linear share between their arguments and the kernel's.
#pragma once

#include "kernels/conv2d.h"
#include "ops/checks.h"
#include "ops/conv_run.h"
#include "ops/weight_cache.h"

namespace qtoolkit::ops {

// weight int8, weight_scale [out_channels] or [1], bias int32 [out_channels], on the device of x.
void check_weight(const char* op, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  const OptionalTensor& bias);
// The same for a weight whose output channels are not its first dimension.
void check_weight(const char* op, const Tensor& x, const Tensor& weight,
                  const c10::SymInt& out_channels, const Tensor& weight_scale,
                  const OptionalTensor& bias);

// The parameters of the output, both or neither; returns the output's dtype.
at::ScalarType check_output_qparams(const char* op, const OptionalTensor& y_scale,
                                    const OptionalTensor& y_zero_point, int64_t quant_min,
                                    int64_t quant_max, const Tensor& x);

// The sum of products of 8-bit codes must fit int32.
void check_accumulator(const char* op, const kernels::Conv2dShape& shape);
// A padded image is copied: 16 GiB at most.
void check_padded_size(const ConvImages& images);

struct ConvParams {
  float x_scale = 1.0f;
  bool x_signed = false;
  int32_t x_zero_point = 0;  // of unsigned codes
  bool float_output = false;
  bool relu = false;
  float y_scale = 1.0f;  // 1 for float output
  int32_t y_zero_point = 0;
  CodeRange y_range;
};
ConvParams read_conv_params(const char* op, const Tensor& x, const Tensor& x_scale,
                            const Tensor& x_zero_point, const OptionalTensor& y_scale,
                            const OptionalTensor& y_zero_point, int64_t quant_min,
                            int64_t quant_max, bool relu);

void set_output(kernels::Conv2dArgs& args, const ConvParams& params, const Tensor& y,
                int64_t y_pixel_stride);

struct WeightTensors {
  const char* op;
  const Tensor& weight;
  const Tensor& weight_scale;
  const OptionalTensor& bias;
  bool depthwise;
  std::optional<TransposedPart> transposed = {};
};
// Points args at the packed weight, which lives as long as the handle.
PackedHandle attach_weight(kernels::Conv2dArgs& args, const ConvParams& params,
                           const WeightTensors& tensors);

}  // namespace qtoolkit::ops
