// Fake-quantization of float tensors, quantize and then dequantize, with the straight-through
// gradient: a mask of one bit an element is all that the backward needs.
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "ops/checks.h"
#include "ops/float_blocks.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/straight_through.h"

namespace qtoolkit::ops {
namespace {

using kernels::FakeQuantizeArgs;
using OptionalInt = std::optional<int64_t>;
using TensorPair = std::tuple<Tensor, Tensor>;

// Everything but the tensors.
struct Options {
  OptionalInt ch_axis, group_size;
  int64_t quant_min, quant_max;
  bool relu = false;

  // The public operator, for messages.
  const char* op() const {
    if (ch_axis) return "fake_quantize_per_channel";
    if (group_size) return "fake_quantize_per_group";
    return relu ? "fake_quantize_relu" : "fake_quantize_per_tensor";
  }
};

// Groups lie along the last axis, wherever that is in memory; one order is enough for them.
at::MemoryFormat result_format(const Tensor& x, const Options& options) {
  return options.group_size ? at::MemoryFormat::Contiguous : x.suggest_memory_format();
}

void check_group_args(const char* op, const Tensor& x, const Tensor& scale,
                      const Tensor& zero_point, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size > 0, "qtoolkit::", op, ": group_size must be positive, got ",
                    group_size);
  TORCH_CHECK_VALUE(x.dim() > 0, "qtoolkit::", op,
                    ": x has no dimensions, so no groups; use the per-tensor operator");
  c10::SymDimVector expected(x.sym_sizes().begin(), x.sym_sizes().end());
  if (expected.back() != 0) expected.back() = (expected.back() - 1) / group_size + 1;
  check_qparam_tensors(op, "", scale, zero_point, x);
  const c10::SymIntArrayRef sizes(expected);
  TORCH_CHECK_VALUE(scale.sym_sizes() == sizes && zero_point.sym_sizes() == sizes, "qtoolkit::", op,
                    ": scale and zero_point must have the shape ", sizes,
                    ", one element for each group of ", group_size, " along the last axis of x ",
                    describe(x), ", got ", scale.sym_sizes(), " and ", zero_point.sym_sizes());
}

void check_args(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                const Options& options) {
  const char* op = options.op();
  check_float(op, "x", x);
  check_quant_range(op, options.quant_min, options.quant_max);
  TORCH_CHECK_VALUE(!options.ch_axis || !options.group_size,
                    "qtoolkit::fake_quantize_mask: ", "ch_axis and group_size exclude each other");
  if (options.ch_axis) {
    const int64_t ch_axis = check_ch_axis(op, x, *options.ch_axis);
    check_channel_qparams(op, scale, zero_point, x, x.sym_size(ch_axis));
  } else if (options.group_size) {
    check_group_args(op, x, scale, zero_point, *options.group_size);
  } else {
    check_qparams(op, "", scale, zero_point, x);
  }
}

Tensor result_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                   const Options& options) {
  check_args(x, scale, zero_point, options);
  return empty_beside(x, x.sym_sizes(), x.scalar_type(), result_format(x, options));
}

// y, and the mask if it is defined.
Tensor run(const Tensor& x, const Tensor& scale, const Tensor& zero_point, const Options& options,
           const Tensor& mask) {
  const Tensor y = result_meta(x, scale, zero_point, options);
  const CodeRange range = check_quant_range(options.op(), options.quant_min, options.quant_max);
  const Tensor scales = scale.contiguous();
  const Tensor zero_points = zero_point.contiguous();
  read_channel_qparams(options.op(), scales, zero_points, range);
  FakeQuantizeArgs args{.scale = scales.const_data_ptr<float>(),
                        .zero_point = zero_points.const_data_ptr<int32_t>(),
                        .quant_min = range.min,
                        .quant_max = range.max,
                        .relu = options.relu};
  const at::MemoryFormat format = result_format(x, options);
  if (options.ch_axis) {
    const int64_t ch_axis = check_ch_axis(options.op(), x, *options.ch_axis);
    const ChannelView view = channel_view(x.sizes(), ch_axis, format);
    args.channels = view.channels;
    args.inner = args.group = view.inner;
  } else if (options.group_size) {
    args.channels = scales.numel();
    args.inner = x.size(-1);
    args.group = std::min(*options.group_size, std::max<int64_t>(1, args.inner));
  }
  fake_quantize_into(y, mask, x.contiguous(format), args);
  return y;
}

Tensor fake_quantize_per_tensor_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                     int64_t quant_min, int64_t quant_max) {
  return result_meta(x, scale, zero_point, {{}, {}, quant_min, quant_max});
}

Tensor fake_quantize_per_channel_meta(const Tensor& x, const Tensor& scale,
                                      const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                                      int64_t quant_max) {
  return result_meta(x, scale, zero_point, {ch_axis, {}, quant_min, quant_max});
}

Tensor fake_quantize_per_group_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                    int64_t group_size, int64_t quant_min, int64_t quant_max) {
  return result_meta(x, scale, zero_point, {{}, group_size, quant_min, quant_max});
}

Tensor fake_quantize_relu_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                               int64_t quant_min, int64_t quant_max) {
  return result_meta(x, scale, zero_point, {{}, {}, quant_min, quant_max, true});
}

TensorPair fake_quantize_mask_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                   OptionalInt ch_axis, OptionalInt group_size, int64_t quant_min,
                                   int64_t quant_max, bool relu) {
  const Tensor y =
      result_meta(x, scale, zero_point, {ch_axis, group_size, quant_min, quant_max, relu});
  return {y, empty_mask(x)};
}

constexpr const char* kBackward = "fake_quantize_mask_backward";

at::MemoryFormat check_backward(const Tensor& grad, const Tensor& mask, int64_t layout) {
  check_float(kBackward, "grad", grad);
  check_dtype(kBackward, "mask", mask, at::kByte);
  check_device(kBackward, "mask", mask, grad);
  TORCH_CHECK_VALUE(mask.dim() == 1 && mask.sym_numel() == (grad.sym_numel() + 7) / 8,
                    "qtoolkit::", kBackward, ": mask must hold one bit for each element of grad ",
                    describe(grad), ", got ", describe(mask));
  return format_of(kBackward, layout, grad.dim());
}

Tensor fake_quantize_mask_backward_meta(const Tensor& grad, const Tensor& mask, int64_t layout) {
  const at::MemoryFormat format = check_backward(grad, mask, layout);
  return empty_beside(grad, grad.sym_sizes(), grad.scalar_type(), format);
}

void fake_quantize_mask_backward_inplace_meta(const Tensor& grad, const Tensor& mask,
                                              int64_t layout) {
  const at::MemoryFormat format = check_backward(grad, mask, layout);
  TORCH_CHECK_VALUE(grad.is_contiguous_or_false(format), "qtoolkit::", kBackward,
                    "_: grad must be dense in the layout of the mask, got strides ",
                    grad.sym_strides());
}

Tensor fake_quantize_per_tensor_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                    int64_t quant_min, int64_t quant_max) {
  return run(x, scale, zero_point, {{}, {}, quant_min, quant_max}, {});
}

Tensor fake_quantize_per_channel_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                     int64_t ch_axis, int64_t quant_min, int64_t quant_max) {
  return run(x, scale, zero_point, {ch_axis, {}, quant_min, quant_max}, {});
}

Tensor fake_quantize_per_group_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                   int64_t group_size, int64_t quant_min, int64_t quant_max) {
  return run(x, scale, zero_point, {{}, group_size, quant_min, quant_max}, {});
}

Tensor fake_quantize_relu_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                              int64_t quant_min, int64_t quant_max) {
  return run(x, scale, zero_point, {{}, {}, quant_min, quant_max, true}, {});
}

TensorPair fake_quantize_mask_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                  OptionalInt ch_axis, OptionalInt group_size, int64_t quant_min,
                                  int64_t quant_max, bool relu) {
  const Tensor mask = empty_mask(x);
  const Tensor y =
      run(x, scale, zero_point, {ch_axis, group_size, quant_min, quant_max, relu}, mask);
  return {y, mask};
}

void apply_mask(const Tensor& y, const Tensor& grad, const Tensor& mask) {
  const Tensor bits = mask.contiguous();
  const kernels::MaskGradientArgs args{.element_bytes = grad.element_size(),
                                       .grad = grad.const_data_ptr(),
                                       .mask = bits.const_data_ptr<uint8_t>(),
                                       .y = y.mutable_data_ptr()};
  parallel_for_mask(grad.numel(),
                    [&](int64_t begin, int64_t end) { kernels::mask_gradient(args, begin, end); });
}

Tensor fake_quantize_mask_backward_cpu(const Tensor& grad, const Tensor& mask, int64_t layout) {
  const Tensor y = fake_quantize_mask_backward_meta(grad, mask, layout);
  apply_mask(y, grad.contiguous(format_of(kBackward, layout, grad.dim())), mask);
  return y;
}

void fake_quantize_mask_backward_inplace_cpu(const Tensor& grad, const Tensor& mask,
                                             int64_t layout) {
  fake_quantize_mask_backward_inplace_meta(grad, mask, layout);
  apply_mask(grad, grad, mask);
}

}  // namespace

void fake_quantize_into(const Tensor& y, const Tensor& mask, const Tensor& x,
                        FakeQuantizeArgs args) {
  if (mask.defined()) args.mask = mask.mutable_data_ptr<uint8_t>();
  parallel_for_mask(x.numel(), [&](int64_t begin, int64_t end) {
    map_floats(x, y, begin, end,
               [&](const float* values, float* results, int64_t first, int64_t from, int64_t to) {
                 FakeQuantizeArgs own = args;
                 own.x = values;
                 own.y = results;
                 own.first = first;
                 kernels::fake_quantize(own, from, to);
               });
  });
}

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  // A mask belongs to the memory order that its tensor was traced with.
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  m.def(
      "fake_quantize_per_tensor(Tensor x, Tensor scale, Tensor zero_point, int quant_min, "
      "int quant_max) -> Tensor",
      tags);
  m.def(
      "fake_quantize_per_channel(Tensor x, Tensor scale, Tensor zero_point, int ch_axis, "
      "int quant_min, int quant_max) -> Tensor",
      tags);
  m.def(
      "fake_quantize_per_group(Tensor x, Tensor scale, Tensor zero_point, int group_size, "
      "int quant_min, int quant_max) -> Tensor",
      tags);
  m.def(
      "fake_quantize_relu(Tensor x, Tensor scale, Tensor zero_point, int quant_min, "
      "int quant_max) -> Tensor",
      tags);
  m.def(
      "fake_quantize_mask(Tensor x, Tensor scale, Tensor zero_point, int? ch_axis, "
      "int? group_size, int quant_min, int quant_max, bool relu) -> (Tensor y, Tensor mask)",
      tags);
  m.def("fake_quantize_mask_backward(Tensor grad, Tensor mask, int layout) -> Tensor", tags);
  m.def("fake_quantize_mask_backward_(Tensor(a!) grad, Tensor mask, int layout) -> ()", tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor_meta);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel_meta);
  m.impl("fake_quantize_per_group", fake_quantize_per_group_meta);
  m.impl("fake_quantize_relu", fake_quantize_relu_meta);
  m.impl("fake_quantize_mask", fake_quantize_mask_meta);
  m.impl("fake_quantize_mask_backward", fake_quantize_mask_backward_meta);
  m.impl("fake_quantize_mask_backward_", fake_quantize_mask_backward_inplace_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor_cpu);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel_cpu);
  m.impl("fake_quantize_per_group", fake_quantize_per_group_cpu);
  m.impl("fake_quantize_relu", fake_quantize_relu_cpu);
  m.impl("fake_quantize_mask", fake_quantize_mask_cpu);
  m.impl("fake_quantize_mask_backward", fake_quantize_mask_backward_cpu);
  m.impl("fake_quantize_mask_backward_", fake_quantize_mask_backward_inplace_cpu);
}

}  // namespace qtoolkit::ops
