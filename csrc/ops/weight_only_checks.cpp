#include "ops/weight_only_checks.h"

#include "ops/layout.h"

namespace qtoolkit::ops {

Tensor check_weight_only(const char* op, const Tensor& x, const CodedWeight& weight,
                         const OptionalTensor& bias) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(weight.bits >= 1 && weight.bits <= 8, "qtoolkit::", op,
                    ": bits must be in [1, 8], got ", weight.bits);
  TORCH_CHECK_VALUE(weight.group_size > 0 && weight.group_size <= INT32_MAX, "qtoolkit::", op,
                    ": group_size must be positive and below 2^31, got ", weight.group_size);
  check_dtype(op, "codes", weight.codes, at::kByte);
  check_rank(op, "codes", weight.codes, 2);
  check_device(op, "codes", weight.codes, x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "qtoolkit::", op, ": x must not be a scalar");
  const c10::SymInt width = x.sym_size(-1);
  const c10::SymInt channels = weight.codes.sym_size(0);
  TORCH_CHECK_VALUE(width > 0 && weight.codes.sym_size(1) == (width * weight.bits + 7) / 8,
                    "qtoolkit::", op,
                    ": a row of codes must have ceil(in_features * bits / 8) bytes; x is ",
                    describe(x), ", codes ", describe(weight.codes), ", bits ", weight.bits);
  const c10::SymInt groups = (width + weight.group_size - 1) / weight.group_size;
  const auto check_groups = [&](const char* name, const Tensor& tensor, at::ScalarType dtype) {
    check_dtype(op, name, tensor, dtype);
    check_device(op, name, tensor, x);
    TORCH_CHECK_VALUE(
        tensor.dim() == 2 && tensor.sym_size(0) == channels && tensor.sym_size(1) == groups,
        "qtoolkit::", op, ": ", name, " must have the shape [", channels, ", ", groups,
        "] of the groups of ", weight.group_size, " of ", width, " in_features, got ",
        describe(tensor));
  };
  check_groups("scale", weight.scale, at::kFloat);
  if (weight.zero_point) check_groups("zero_point", *weight.zero_point, at::kByte);
  if (bias) {
    check_dtype(op, "bias", *bias, at::kFloat);
    check_device(op, "bias", *bias, x);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == channels, "qtoolkit::", op,
                      ": bias must hold one element for each of ", channels,
                      " output channels, got ", describe(*bias));
  }
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = channels;
  return empty_beside(x, sizes, at::kFloat, at::MemoryFormat::Contiguous);
}

}  // namespace qtoolkit::ops
