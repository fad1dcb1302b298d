#include "ops/checks.h"

#include <c10/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <sstream>

namespace qtoolkit::ops {

std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << c10::getDtypeNames(tensor.scalar_type()).first << " " << tensor.sym_sizes();
  return text.str();
}

CodeRange check_quant_range(const char* op, int64_t quant_min, int64_t quant_max) {
  const bool fits = (quant_min >= 0 && quant_max <= 255) || (quant_min >= -128 && quant_max <= 127);
  TORCH_CHECK_VALUE(fits && quant_min < quant_max, "qtoolkit::", op,
                    ": quant_min and quant_max must satisfy quant_min < quant_max and lie in "
                    "[-128, 127] or [0, 255], got quant_min ",
                    quant_min, " and quant_max ", quant_max);
  return {static_cast<int32_t>(quant_min), static_cast<int32_t>(quant_max)};
}

CodeRange check_codes(const char* op, const char* argument, const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kByte || dtype == at::kChar, "qtoolkit::", op, ": ", argument,
                   " must hold uint8 or int8 codes, got ", describe(x),
                   "; quantize it with quantize_per_tensor first");
  return dtype == at::kChar ? CodeRange{-128, 127} : CodeRange{0, 255};
}

void check_float(const char* op, const char* argument, const Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                   "qtoolkit::", op, ": ", argument, " must be float32, float16 or bfloat16, got ",
                   describe(x), "; convert it with .float() first");
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "qtoolkit::", op, ": ", argument, " must be ",
                   c10::getDtypeNames(dtype).first, ", got ", describe(tensor));
}

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), "qtoolkit::", op, ": ", argument, " is on ",
                    tensor.device(), " and the input on ", x.device(), "; move them to one device");
}

void check_rank(const char* op, const char* argument, const Tensor& tensor, int64_t rank) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, "qtoolkit::", op, ": ", argument, " must have ", rank,
                    " dimensions, got ", describe(tensor));
}

void check_qparam_tensors(const char* op, const char* prefix, const Tensor& scale,
                          const Tensor& zero_point, const Tensor& x) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "qtoolkit::", op, ": ", prefix,
                   "scale must be float32, got ", describe(scale));
  TORCH_CHECK_TYPE(zero_point.scalar_type() == at::kInt, "qtoolkit::", op, ": ", prefix,
                   "zero_point must be int32, got ", describe(zero_point));
  TORCH_CHECK_VALUE(scale.device() == x.device() && zero_point.device() == x.device(),
                    "qtoolkit::", op, ": ", prefix, "scale is on ", scale.device(), ", ", prefix,
                    "zero_point on ", zero_point.device(), " and the input on ", x.device(),
                    "; move them to one device");
}

namespace {

void check_values(const char* op, const char* prefix, std::span<const float> scales,
                  std::span<const int32_t> zero_points, CodeRange range) {
  for (const float scale : scales) {
    TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0, "qtoolkit::", op, ": ", prefix,
                      "scale must be positive and finite, got ", scale);
  }
  for (const int32_t zero_point : zero_points) {
    TORCH_CHECK_VALUE(zero_point >= range.min && zero_point <= range.max, "qtoolkit::", op, ": ",
                      prefix, "zero_point must lie in [", range.min, ", ", range.max, "], got ",
                      zero_point);
  }
}

}  // namespace

void check_qparams(const char* op, const char* prefix, const Tensor& scale,
                   const Tensor& zero_point, const Tensor& x) {
  check_qparam_tensors(op, prefix, scale, zero_point, x);
  TORCH_CHECK_VALUE(scale.sym_numel() == 1 && zero_point.sym_numel() == 1, "qtoolkit::", op, ": ",
                    prefix, "scale and ", prefix, "zero_point must hold one element, got ",
                    scale.sym_sizes(), " and ", zero_point.sym_sizes());
}

void check_channel_qparams(const char* op, const Tensor& scale, const Tensor& zero_point,
                           const Tensor& x, const c10::SymInt& channels, const char* what) {
  check_qparam_tensors(op, "", scale, zero_point, x);
  TORCH_CHECK_VALUE(scale.dim() == 1 && zero_point.dim() == 1 && scale.sym_size(0) == channels &&
                        zero_point.sym_size(0) == channels,
                    "qtoolkit::", op, ": scale and zero_point must hold one element for each of ",
                    channels, " ", what, ", got ", scale.sym_sizes(), " and ",
                    zero_point.sym_sizes());
}

void check_parameter(const char* op, const char* argument, const Tensor& parameter, const Tensor& x,
                     std::optional<int64_t> ch_axis) {
  check_dtype(op, argument, parameter, at::kFloat);
  check_device(op, argument, parameter, x);
  if (!ch_axis) {
    TORCH_CHECK_VALUE(parameter.sym_numel() == 1, "qtoolkit::", op, ": ", argument,
                      " must hold one element, got ", parameter.sym_sizes(),
                      "; give ch_axis for one element a channel");
    return;
  }
  const c10::SymInt channels = x.sym_size(check_ch_axis(op, x, *ch_axis));
  TORCH_CHECK_VALUE(parameter.dim() == 1 && parameter.sym_size(0) == channels, "qtoolkit::", op,
                    ": ", argument, " must hold one element for each of ", channels,
                    " channels, got ", parameter.sym_sizes());
}

int64_t check_ch_axis(const char* op, const Tensor& x, int64_t ch_axis) {
  const int64_t rank = x.dim();
  TORCH_CHECK_VALUE(rank > 0, "qtoolkit::", op, ": x has no dimensions, so ch_axis ", ch_axis,
                    " names none of them; use the per-tensor operator");
  TORCH_CHECK_VALUE(ch_axis >= -rank && ch_axis < rank, "qtoolkit::", op, ": ch_axis must lie in [",
                    -rank, ", ", rank - 1, "] for x ", describe(x), ", got ", ch_axis);
  return ch_axis < 0 ? ch_axis + rank : ch_axis;
}

void check_pair(const char* op, const char* argument, at::IntArrayRef pair, int64_t least) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least && pair[0] <= kMost &&
                        pair[1] <= kMost,
                    "qtoolkit::", op, ": ", argument, " must be two numbers in [", least, ", ",
                    kMost, "], got ", pair);
}

QParams read_qparams(const char* op, const char* prefix, const Tensor& scale,
                     const Tensor& zero_point, CodeRange range) {
  const QParams result{*scale.const_data_ptr<float>(), *zero_point.const_data_ptr<int32_t>()};
  check_values(op, prefix, {&result.scale, 1}, {&result.zero_point, 1}, range);
  return result;
}

void read_channel_qparams(const char* op, const Tensor& scale, const Tensor& zero_point,
                          CodeRange range) {
  const auto channels = static_cast<size_t>(scale.numel());
  check_values(op, "", {scale.const_data_ptr<float>(), channels},
               {zero_point.const_data_ptr<int32_t>(), channels}, range);
}

void check_scales(const char* op, const char* argument, std::span<const float> scales) {
  for (const float scale : scales) {
    TORCH_CHECK_VALUE(std::isfinite(scale) && scale > 0, "qtoolkit::", op, ": ", argument,
                      " must be positive and finite, got ", scale);
  }
}

float multiplier(const char* op, double numerator, double denominator, const char* what) {
  const auto result = static_cast<float>(numerator / denominator);
  TORCH_CHECK_VALUE(std::isfinite(result), "qtoolkit::", op, ": ", what, ", ", numerator, " / ",
                    denominator, ", overflows float32; check the scales");
  return result;
}

}  // namespace qtoolkit::ops
