// Fake-quantize to few values: ternary, binary, small floats, and blocks of small floats.
#include "kernels/low_bit.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>

#include "kernels/statistics.h"
#include "ops/checks.h"
#include "ops/float_blocks.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/straight_through.h"

namespace qtoolkit::ops {
namespace {

using kernels::FloatFormat;
using kernels::LowBitArgs;
using OptionalInt = std::optional<int64_t>;
using TensorPair = std::tuple<Tensor, Tensor>;

constexpr const char* kTernary = "fake_quantize_ternary";
constexpr const char* kBinary = "fake_quantize_binary";
constexpr const char* kFloat = "fake_quantize_float";
constexpr const char* kBlockFloat = "fake_quantize_block_float";

Tensor empty_like_x(const Tensor& x) {
  return empty_beside(x, x.sym_sizes(), x.scalar_type(), x.suggest_memory_format());
}

std::span<const float> values_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), static_cast<size_t>(tensor.numel())};
}

void check_not_negative(const char* op, const char* argument, std::span<const float> values) {
  for (const float value : values) {
    TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, "qtoolkit::", op, ": ", argument,
                      " must be finite and not negative, got ", value);
  }
}

FloatFormat check_format(const char* op, int64_t mantissa_bits, int64_t min_exponent,
                         double max_value) {
  TORCH_CHECK_VALUE(mantissa_bits >= 1 && mantissa_bits <= 22, "qtoolkit::", op,
                    ": mantissa_bits must lie in [1, 22], got ", mantissa_bits);
  TORCH_CHECK_VALUE(min_exponent >= -126 && min_exponent <= 64, "qtoolkit::", op,
                    ": min_exponent must lie in [-126, 64], got ", min_exponent);
  const FloatFormat format{static_cast<int32_t>(mantissa_bits), static_cast<int32_t>(min_exponent),
                           static_cast<float>(max_value)};
  const bool normal =
      std::isfinite(format.max_value) && format.max_value >= std::ldexp(1.0f, format.min_exponent);
  int exponent = 0;
  const float steps =
      std::ldexp(std::frexp(normal ? format.max_value : 0.5f, &exponent), format.mantissa_bits + 1);
  TORCH_CHECK_VALUE(normal && max_value == format.max_value && steps == std::floor(steps),
                    "qtoolkit::", op, ": max_value must be a number of the format with ",
                    mantissa_bits, " mantissa bits from 2^", min_exponent, " on, got ", max_value);
  return format;
}

// Runs kernel(args, begin, end), whose LowBitArgs are args.common; writes y, which it returns, and
// the mask if it is defined.
template <class Args>
Tensor run(const Tensor& x, const Tensor& scales, OptionalInt ch_axis, const Tensor& mask,
           void (*kernel)(const Args&, int64_t, int64_t), Args args) {
  const at::MemoryFormat format = x.suggest_memory_format();
  if (ch_axis) {
    const int64_t axis = *ch_axis < 0 ? *ch_axis + x.dim() : *ch_axis;
    const ChannelView view = channel_view(x.sizes(), axis, format);
    args.common.channels = view.channels;
    args.common.inner = view.inner;
  }
  args.common.scale = scales.const_data_ptr<float>();
  if (mask.defined()) args.common.mask = mask.mutable_data_ptr<uint8_t>();
  const Tensor dense = x.contiguous(format);
  const Tensor y = empty_like_x(x);
  parallel_for_mask(x.numel(), [&](int64_t begin, int64_t end) {
    map_floats(dense, y, begin, end,
               [&](const float* values, float* results, int64_t first, int64_t from, int64_t to) {
                 Args own = args;
                 own.common.x = values;
                 own.common.y = results;
                 own.common.first = first;
                 kernel(own, from, to);
               });
  });
  return y;
}

// --- ternary
// --------------------------------------------------------------------------------------

Tensor fake_quantize_ternary_meta(const Tensor& x, const Tensor& scale, const Tensor& threshold,
                                  OptionalInt ch_axis) {
  check_float(kTernary, "x", x);
  check_parameter(kTernary, "scale", scale, x, ch_axis);
  check_parameter(kTernary, "threshold", threshold, x, ch_axis);
  return empty_like_x(x);
}

Tensor fake_quantize_ternary_cpu(const Tensor& x, const Tensor& scale, const Tensor& threshold,
                                 OptionalInt ch_axis) {
  check_float(kTernary, "x", x);
  check_parameter(kTernary, "scale", scale, x, ch_axis);
  check_parameter(kTernary, "threshold", threshold, x, ch_axis);
  const Tensor scales = scale.contiguous(), thresholds = threshold.contiguous();
  check_not_negative(kTernary, "scale", values_of(scales));
  check_not_negative(kTernary, "threshold", values_of(thresholds));
  return run<kernels::TernaryArgs>(x, scales, ch_axis, {}, kernels::fake_quantize_ternary,
                                   {.threshold = thresholds.const_data_ptr<float>()});
}

// --- binary
// ---------------------------------------------------------------------------------------

void check_binary(const Tensor& x, const Tensor& scale, OptionalInt ch_axis, double clip) {
  check_float(kBinary, "x", x);
  check_parameter(kBinary, "scale", scale, x, ch_axis);
  TORCH_CHECK_VALUE(clip >= 0, "qtoolkit::", kBinary, ": clip must not be negative, got ", clip);
}

Tensor run_binary(const Tensor& x, const Tensor& scale, OptionalInt ch_axis, double clip,
                  const Tensor& mask) {
  check_binary(x, scale, ch_axis, clip);
  const Tensor scales = scale.contiguous();
  check_not_negative(kBinary, "scale", values_of(scales));
  return run<kernels::BinaryArgs>(x, scales, ch_axis, mask, kernels::fake_quantize_binary,
                                  {.clip = static_cast<float>(clip)});
}

Tensor fake_quantize_binary_meta(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                 double clip) {
  check_binary(x, scale, ch_axis, clip);
  return empty_like_x(x);
}

Tensor fake_quantize_binary_cpu(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                double clip) {
  return run_binary(x, scale, ch_axis, clip, {});
}

TensorPair fake_quantize_binary_mask_meta(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                          double clip) {
  return {fake_quantize_binary_meta(x, scale, ch_axis, clip), empty_mask(x)};
}

TensorPair fake_quantize_binary_mask_cpu(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                         double clip) {
  const Tensor mask = empty_mask(x);
  return {run_binary(x, scale, ch_axis, clip, mask), mask};
}

// --- small floats
// ---------------------------------------------------------------------------------

Tensor run_float(const Tensor& x, const Tensor& scale, OptionalInt ch_axis, int64_t mantissa_bits,
                 int64_t min_exponent, double max_value, const Tensor& mask) {
  check_float(kFloat, "x", x);
  check_parameter(kFloat, "scale", scale, x, ch_axis);
  const Tensor scales = scale.contiguous();
  check_scales(kFloat, "scale", values_of(scales));
  return run<kernels::FloatArgs>(
      x, scales, ch_axis, mask, kernels::fake_quantize_float,
      {.format = check_format(kFloat, mantissa_bits, min_exponent, max_value)});
}

Tensor fake_quantize_float_meta(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                int64_t mantissa_bits, int64_t min_exponent, double max_value) {
  check_float(kFloat, "x", x);
  check_parameter(kFloat, "scale", scale, x, ch_axis);
  check_format(kFloat, mantissa_bits, min_exponent, max_value);
  return empty_like_x(x);
}

Tensor fake_quantize_float_cpu(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                               int64_t mantissa_bits, int64_t min_exponent, double max_value) {
  return run_float(x, scale, ch_axis, mantissa_bits, min_exponent, max_value, {});
}

TensorPair fake_quantize_float_mask_meta(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                         int64_t mantissa_bits, int64_t min_exponent,
                                         double max_value) {
  return {fake_quantize_float_meta(x, scale, ch_axis, mantissa_bits, min_exponent, max_value),
          empty_mask(x)};
}

TensorPair fake_quantize_float_mask_cpu(const Tensor& x, const Tensor& scale, OptionalInt ch_axis,
                                        int64_t mantissa_bits, int64_t min_exponent,
                                        double max_value) {
  const Tensor mask = empty_mask(x);
  return {run_float(x, scale, ch_axis, mantissa_bits, min_exponent, max_value, mask), mask};
}

// --- blocks of small floats
// -----------------------------------------------------------------------

constexpr float kLargestE4m3 = 448.0f;

// Blocks lie along the last axis, wherever that is in memory; the result is contiguous.
Tensor fake_quantize_block_float_meta(const Tensor& x, const OptionalTensor& tensor_scale,
                                      int64_t block_size, int64_t mantissa_bits,
                                      int64_t min_exponent, double max_value,
                                      std::string_view scale_format) {
  check_float(kBlockFloat, "x", x);
  check_format(kBlockFloat, mantissa_bits, min_exponent, max_value);
  TORCH_CHECK_VALUE(max_value >= 1, "qtoolkit::", kBlockFloat,
                    ": max_value must be at least 1, got ", max_value);
  TORCH_CHECK_VALUE(block_size >= 1 && block_size <= kFloatBlock, "qtoolkit::", kBlockFloat,
                    ": block_size must lie in [1, ", kFloatBlock, "], got ", block_size);
  TORCH_CHECK_VALUE(x.dim() > 0, "qtoolkit::", kBlockFloat, ": x has no dimensions, so no blocks");
  TORCH_CHECK_VALUE(scale_format == "e8m0" || scale_format == "e4m3", "qtoolkit::", kBlockFloat,
                    ": scale_format must be e8m0 or e4m3, got ", scale_format);
  TORCH_CHECK_VALUE(!tensor_scale || scale_format == "e4m3", "qtoolkit::", kBlockFloat,
                    ": a tensor_scale is for scale_format e4m3, got ", scale_format);
  if (tensor_scale) check_parameter(kBlockFloat, "tensor_scale", *tensor_scale, x, std::nullopt);
  return empty_beside(x, x.sym_sizes(), x.scalar_type(), at::MemoryFormat::Contiguous);
}

// The float32 scale under which the largest |x|, of those that are not NaN, gets the largest block
// scale.
float tensor_scale_of(const Tensor& x, float max_value) {
  const float amax = at::parallel_reduce(
      0, x.numel(), kElementGrain, 0.0f,
      [&](int64_t begin, int64_t end, float result) {
        read_floats(
            x, begin, end, [&](const float* values, int64_t first, int64_t from, int64_t to) {
              constexpr float kInf = std::numeric_limits<float>::infinity();
              float low = kInf, high = -kInf;
              kernels::min_max(
                  {.x = values - first, .inner = to, .minimum = &low, .maximum = &high}, from, to);
              if (!std::isnan(low)) {
                result = std::max({result, -low, high});
                return;
              }
              for (int64_t i = from; i < to; ++i) {
                const float value = std::abs(values[i - first]);
                if (value > result) result = value;  // not where it is NaN
              }
            });
        return result;
      },
      [](float a, float b) { return std::max(a, b); });
  if (amax == 0.0f) return 1.0f;
  constexpr float kLeast = std::numeric_limits<float>::min();
  constexpr float kMost = std::numeric_limits<float>::max();
  return std::max(std::min(amax, kMost) / (kLargestE4m3 * max_value), kLeast);
}

Tensor fake_quantize_block_float_cpu(const Tensor& x, const OptionalTensor& tensor_scale,
                                     int64_t block_size, int64_t mantissa_bits,
                                     int64_t min_exponent, double max_value,
                                     std::string_view scale_format) {
  const Tensor y = fake_quantize_block_float_meta(x, tensor_scale, block_size, mantissa_bits,
                                                  min_exponent, max_value, scale_format);
  const Tensor dense = x.contiguous();
  kernels::BlockFloatArgs args{
      .format = check_format(kBlockFloat, mantissa_bits, min_exponent, max_value),
      .block = block_size};
  if (tensor_scale) {
    const Tensor given = tensor_scale->contiguous();
    check_scales(kBlockFloat, "tensor_scale", values_of(given));
    args.tensor_scale = values_of(given)[0];
  } else if (scale_format == "e4m3") {
    args.tensor_scale = tensor_scale_of(dense, args.format.max_value);
  }
  if (x.numel() == 0) return y;
  // Whole blocks of one row, which fit a block of 16-bit floats.
  const int64_t length = x.size(-1), piece = kFloatBlock / block_size * block_size;
  const int64_t pieces = (length + piece - 1) / piece;
  at::parallel_for(
      0, x.numel() / length * pieces, grain_of(kElementGrain, std::min(length, piece)),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t from = i / pieces * length + i % pieces * piece;
          const int64_t to = std::min(from + piece, (i / pieces + 1) * length);
          map_floats(dense, y, from, to,
                     [&](const float* values, float* results, int64_t first, int64_t, int64_t) {
                       kernels::BlockFloatArgs own = args;
                       own.length = to - from;
                       own.x = values + (from - first);
                       own.y = results + (from - first);
                       kernels::fake_quantize_block_float(
                           own, 0, (own.length + block_size - 1) / block_size);
                     });
        }
      });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  // A mask belongs to the memory order that its tensor was traced with.
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  m.def("fake_quantize_ternary(Tensor x, Tensor scale, Tensor threshold, int? ch_axis) -> Tensor",
        tags);
  m.def("fake_quantize_binary(Tensor x, Tensor scale, int? ch_axis, float clip) -> Tensor", tags);
  m.def(
      "fake_quantize_binary_mask(Tensor x, Tensor scale, int? ch_axis, float clip) "
      "-> (Tensor y, Tensor mask)",
      tags);
  m.def(
      "fake_quantize_float(Tensor x, Tensor scale, int? ch_axis, int mantissa_bits, "
      "int min_exponent, float max_value) -> Tensor",
      tags);
  m.def(
      "fake_quantize_float_mask(Tensor x, Tensor scale, int? ch_axis, int mantissa_bits, "
      "int min_exponent, float max_value) -> (Tensor y, Tensor mask)",
      tags);
  m.def(
      "fake_quantize_block_float(Tensor x, Tensor? tensor_scale, int block_size, "
      "int mantissa_bits, int min_exponent, float max_value, str scale_format) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("fake_quantize_ternary", fake_quantize_ternary_meta);
  m.impl("fake_quantize_binary", fake_quantize_binary_meta);
  m.impl("fake_quantize_binary_mask", fake_quantize_binary_mask_meta);
  m.impl("fake_quantize_float", fake_quantize_float_meta);
  m.impl("fake_quantize_float_mask", fake_quantize_float_mask_meta);
  m.impl("fake_quantize_block_float", fake_quantize_block_float_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("fake_quantize_ternary", fake_quantize_ternary_cpu);
  m.impl("fake_quantize_binary", fake_quantize_binary_cpu);
  m.impl("fake_quantize_binary_mask", fake_quantize_binary_mask_cpu);
  m.impl("fake_quantize_float", fake_quantize_float_cpu);
  m.impl("fake_quantize_float_mask", fake_quantize_float_mask_cpu);
  m.impl("fake_quantize_block_float", fake_quantize_block_float_cpu);
}

}  // namespace qtoolkit::ops
