// Checks of operator arguments, shared by all operators. They throw ValueError and TypeError that
// name the operator, the argument, what it got and what to do.
//
// The check_ functions look at dtype, device and shape only, so Meta kernels call them too; the
// read_ functions look at values and are for CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <span>
#include <string>

namespace qtoolkit::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The codes that a tensor may hold.
struct CodeRange {
  int32_t min = 0, max = 255;
  bool is_signed() const { return min < 0; }
  at::ScalarType dtype() const { return is_signed() ? at::kChar : at::kByte; }
};

// Quantization parameters of a whole tensor.
struct QParams {
  float scale = 1.0f;
  int32_t zero_point = 0;
};

// "float32 [2, 3]", for error messages.
std::string describe(const Tensor& tensor);

// quant_min < quant_max, both in [-128, 127] or both in [0, 255].
CodeRange check_quant_range(const char* op, int64_t quant_min, int64_t quant_max);

// x holds uint8 or int8 codes; returns the range of its dtype.
CodeRange check_codes(const char* op, const char* argument, const Tensor& x);

// x is float32, float16 or bfloat16.
void check_float(const char* op, const char* argument, const Tensor& x);

void check_dtype(const char* op, const char* argument, const Tensor& tensor, at::ScalarType dtype);
void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& x);
void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank);

// scale float32 and zero_point int32, on the device of x. `prefix` comes before "scale" and
// "zero_point" in messages, as in "x_".
void check_qparam_tensors(const char* op, const char* prefix, const Tensor& scale,
                          const Tensor& zero_point, const Tensor& x);
// The same with one element each.
void check_qparams(const char* op, const char* prefix, const Tensor& scale,
                   const Tensor& zero_point, const Tensor& x);
// The same with one element for each of `channels`, or of what else they are.
void check_channel_qparams(const char* op, const Tensor& scale, const Tensor& zero_point,
                           const Tensor& x, const c10::SymInt& channels,
                           const char* what = "channels");

// A float32 parameter on the device of x, of one element or, with a ch_axis, of one for each
// channel.
void check_parameter(const char* op, const char* argument, const Tensor& parameter, const Tensor& x,
                     std::optional<int64_t> ch_axis);

// ch_axis counted from the front.
int64_t check_ch_axis(const char* op, const Tensor& x, int64_t ch_axis);

// Two numbers, each in [least, 2^31).
void check_pair(const char* op, const char* argument, at::IntArrayRef pair, int64_t least);

// The values of checked CPU tensors: scale > 0 and finite, zero_point in the range.
QParams read_qparams(const char* op, const char* prefix, const Tensor& scale,
                     const Tensor& zero_point, CodeRange range);
// `scale` and `zero_point` are contiguous.
void read_channel_qparams(const char* op, const Tensor& scale, const Tensor& zero_point,
                          CodeRange range);
void check_scales(const char* op, const char* argument, std::span<const float> scales);

// The lower bound of the output's codes: real 0 with ReLU.
inline int32_t relu_bound(CodeRange range, int32_t zero_point, bool relu) {
  return relu && zero_point > range.min ? zero_point : range.min;
}

// The factor of requantization, float(numerator / denominator); an error that names `what` if it
// overflows float32.
float multiplier(const char* op, double numerator, double denominator,
                 const char* what = "the ratio of the input's and the output's scale");

}  // namespace qtoolkit::ops
