#include "ops/exact_codes.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels/quantize.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

// Elements that are encoded, decoded and compared while they are in the first-level cache.
constexpr int64_t kBlock = 2048;

bool encode(const float* x, uint8_t* codes, int64_t count, const float* scale,
            const int32_t* zero_point, CodeRange range) {
  float decoded[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    kernels::QuantizeArgs args{.inner = size,
                               .scale = scale,
                               .zero_point = zero_point,
                               .quant_min = range.min,
                               .quant_max = range.max,
                               .x = x + begin,
                               .codes = codes + begin,
                               .y_codes = codes + begin,
                               .y = decoded};
    kernels::quantize(args, 0, size);
    kernels::dequantize(args, 0, size);
    if (std::memcmp(decoded, x + begin, static_cast<size_t>(size) * sizeof(float)) != 0) {
      return false;
    }
  }
  return true;
}

// A row is what has one scale.
struct Rows {
  int64_t count, size;
};

Rows rows_of(const Tensor& x, const Tensor& scale) {
  const int64_t count = scale.numel();
  return {count, count == 0 ? 0 : x.numel() / count};
}

bool valid(const Tensor& scale, const Tensor& zero_point, CodeRange range) {
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  for (int64_t i = 0; i < scales.numel(); ++i) {
    const float value = scales.const_data_ptr<float>()[i];
    const int32_t offset = zero_points.const_data_ptr<int32_t>()[i];
    const bool invertible = value > 0 && std::isfinite(value) && std::isfinite(1.0f / value);
    if (!invertible || offset < range.min || offset > range.max) return false;
  }
  return true;
}

void check_scale(const char* name, const OptionalTensor& scale, const Tensor& x) {
  constexpr const char* op = "conv2d_train";
  if (!scale || !scale->defined()) return;
  check_dtype(op, name, *scale, at::kFloat);
  check_device(op, name, *scale, x);
}

}  // namespace

void check_code_arguments(const Tensor& x, const OptionalTensor& x_scale,
                          const OptionalTensor& x_zero_point, int64_t x_quant_min,
                          int64_t x_quant_max, const Tensor& weight,
                          const OptionalTensor& weight_scale, int64_t weight_quant_max) {
  constexpr const char* op = "conv2d_train";
  check_quant_range(op, x_quant_min, x_quant_max);
  TORCH_CHECK_VALUE(weight_quant_max > 0 && weight_quant_max <= 127, "qtoolkit::", op,
                    ": weight_quant_max must lie in [1, 127], got ", weight_quant_max);
  check_scale("x_scale", x_scale, x);
  check_scale("weight_scale", weight_scale, weight);
  const bool scaled = x_scale && x_scale->defined();
  const bool shifted = x_zero_point && x_zero_point->defined();
  TORCH_CHECK_VALUE(scaled == shifted, "qtoolkit::", op,
                    ": x_scale and x_zero_point come together, or both are None");
  if (!scaled) return;
  check_dtype(op, "x_zero_point", *x_zero_point, at::kInt);
  check_device(op, "x_zero_point", *x_zero_point, x);
  TORCH_CHECK_VALUE(x_scale->sym_numel() == 1 && x_zero_point->sym_numel() == 1, "qtoolkit::", op,
                    ": x_scale and x_zero_point must have one element each, got ",
                    describe(*x_scale), " and ", describe(*x_zero_point));
}

std::optional<Tensor> exact_codes(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                  CodeRange range) {
  const at::MemoryFormat format = x.suggest_memory_format();
  if (x.numel() == 0 || !x.is_contiguous(format)) return std::nullopt;
  if (scale.numel() != zero_point.numel()) return std::nullopt;
  if (scale.numel() != 1 && scale.numel() != x.size(0)) return std::nullopt;
  if (!valid(scale, zero_point, range)) return std::nullopt;
  const Tensor codes = empty_beside(x, x.sym_sizes(), range.dtype(), format);
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  const float* from = x.const_data_ptr<float>();
  auto* to = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const float* row_scale = scales.const_data_ptr<float>();
  const int32_t* row_zero_point = zero_points.const_data_ptr<int32_t>();
  const Rows rows = rows_of(x, scale);
  std::atomic<bool> exact = true;
  const int64_t parts = (rows.size + kElementGrain - 1) / kElementGrain;
  at::parallel_for(0, rows.count * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end && exact.load(std::memory_order_relaxed); ++unit) {
      const int64_t row = unit / parts, first = unit % parts * kElementGrain;
      const int64_t at = row * rows.size + first;
      if (!encode(from + at, to + at, std::min(kElementGrain, rows.size - first), row_scale + row,
                  row_zero_point + row, range)) {
        exact.store(false, std::memory_order_relaxed);
      }
    }
  });
  if (!exact) return std::nullopt;
  return codes;
}

Tensor from_exact_codes(const Tensor& codes, const Tensor& scale, const Tensor& zero_point) {
  const at::MemoryFormat format = codes.suggest_memory_format();
  const Tensor y = empty_beside(codes, codes.sym_sizes(), at::kFloat, format);
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  const Rows rows = rows_of(codes, scale);
  const kernels::QuantizeArgs args{.channels = rows.count,
                                   .inner = rows.size,
                                   .scale = scales.const_data_ptr<float>(),
                                   .zero_point = zero_points.const_data_ptr<int32_t>(),
                                   .quant_min = codes.scalar_type() == at::kChar ? -128 : 0,
                                   .codes = static_cast<const uint8_t*>(codes.const_data_ptr()),
                                   .y = y.mutable_data_ptr<float>()};
  at::parallel_for(0, codes.numel(), kElementGrain,
                   [&](int64_t begin, int64_t end) { kernels::dequantize(args, begin, end); });
  return y;
}

}  // namespace qtoolkit::ops
