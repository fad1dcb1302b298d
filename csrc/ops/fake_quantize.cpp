// Fake-quantization of float tensors: quantize, then dequantize.
#include <torch/library.h>

#include "kernels/quantize.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

using kernels::QuantizeArgs;

void check_tensor_args(const char* op, const Tensor& x, const Tensor& scale,
                       const Tensor& zero_point, int64_t quant_min, int64_t quant_max) {
  check_float(op, "x", x);
  check_quant_range(op, quant_min, quant_max);
  check_qparams(op, "", scale, zero_point, x);
}

void check_channel_args(const char* op, const Tensor& x, const Tensor& scale,
                        const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                        int64_t quant_max) {
  check_float(op, "x", x);
  check_quant_range(op, quant_min, quant_max);
  ch_axis = check_ch_axis(op, x, ch_axis);
  check_channel_qparams(op, scale, zero_point, x, x.sym_size(ch_axis));
}

void check_grad(const char* op, const Tensor& grad, const Tensor& x) {
  check_float(op, "grad", grad);
  check_device(op, "grad", grad, x);
  TORCH_CHECK_VALUE(grad.sym_sizes() == x.sym_sizes(), "qtoolkit::", op,
                    ": grad must have the shape of x, got ", describe(grad), " and ", describe(x));
}

Tensor empty_like_x(const Tensor& x, at::ScalarType dtype) {
  return empty_beside(x, x.sym_sizes(), dtype, x.suggest_memory_format());
}

Tensor fake_quantize_per_tensor_meta(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                     int64_t quant_min, int64_t quant_max) {
  check_tensor_args("fake_quantize_per_tensor", x, scale, zero_point, quant_min, quant_max);
  return empty_like_x(x, x.scalar_type());
}

Tensor fake_quantize_per_channel_meta(const Tensor& x, const Tensor& scale,
                                      const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                                      int64_t quant_max) {
  check_channel_args("fake_quantize_per_channel", x, scale, zero_point, ch_axis, quant_min,
                     quant_max);
  return empty_like_x(x, x.scalar_type());
}

Tensor fake_quantize_per_tensor_backward_meta(const Tensor& grad, const Tensor& x,
                                              const Tensor& scale, const Tensor& zero_point,
                                              int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "fake_quantize_per_tensor_backward";
  check_tensor_args(op, x, scale, zero_point, quant_min, quant_max);
  check_grad(op, grad, x);
  return empty_like_x(x, grad.scalar_type());
}

Tensor fake_quantize_per_channel_backward_meta(const Tensor& grad, const Tensor& x,
                                               const Tensor& scale, const Tensor& zero_point,
                                               int64_t ch_axis, int64_t quant_min,
                                               int64_t quant_max) {
  constexpr const char* op = "fake_quantize_per_channel_backward";
  check_channel_args(op, x, scale, zero_point, ch_axis, quant_min, quant_max);
  check_grad(op, grad, x);
  return empty_like_x(x, grad.scalar_type());
}

// Arithmetic is float32; float16 and bfloat16 are converted before and after it.
Tensor run_forward(const Tensor& x, QuantizeArgs args) {
  const Tensor dense = x.to(at::kFloat).contiguous(x.suggest_memory_format());
  const Tensor y = empty_like_x(x, at::kFloat);
  args.x = dense.const_data_ptr<float>();
  args.y = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), kElementGrain,
                   [&](int64_t begin, int64_t end) { kernels::fake_quantize(args, begin, end); });
  return y.to(x.scalar_type());
}

Tensor run_backward(const Tensor& grad, const Tensor& x, QuantizeArgs args) {
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor dense = x.to(at::kFloat).contiguous(format);
  const Tensor dense_grad = grad.to(at::kFloat).contiguous(format);
  const Tensor y = empty_like_x(x, at::kFloat);
  args.x = dense.const_data_ptr<float>();
  args.grad = dense_grad.const_data_ptr<float>();
  args.y = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    kernels::fake_quantize_backward(args, begin, end);
  });
  return y.to(grad.scalar_type());
}

// Calls run(args) with the values of checked arguments.
template <class Run>
Tensor with_tensor_args(const char* op, const Tensor& x, const Tensor& scale,
                        const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                        const Run& run) {
  check_tensor_args(op, x, scale, zero_point, quant_min, quant_max);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const QParams qparams = read_qparams(op, "", scale, zero_point, range);
  return run(QuantizeArgs{.inner = x.numel(),
                          .scale = &qparams.scale,
                          .zero_point = &qparams.zero_point,
                          .quant_min = range.min,
                          .quant_max = range.max});
}

template <class Run>
Tensor with_channel_args(const char* op, const Tensor& x, const Tensor& scale,
                         const Tensor& zero_point, int64_t ch_axis, int64_t quant_min,
                         int64_t quant_max, const Run& run) {
  check_channel_args(op, x, scale, zero_point, ch_axis, quant_min, quant_max);
  const CodeRange range = check_quant_range(op, quant_min, quant_max);
  const Tensor scales = scale.contiguous();
  const Tensor zero_points = zero_point.contiguous();
  read_channel_qparams(op, scales, zero_points, range);
  const ChannelView view =
      channel_view(x.sizes(), check_ch_axis(op, x, ch_axis), x.suggest_memory_format());
  return run(QuantizeArgs{.channels = view.channels,
                          .inner = view.inner,
                          .scale = scales.const_data_ptr<float>(),
                          .zero_point = zero_points.const_data_ptr<int32_t>(),
                          .quant_min = range.min,
                          .quant_max = range.max});
}

Tensor fake_quantize_per_tensor_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                    int64_t quant_min, int64_t quant_max) {
  return with_tensor_args("fake_quantize_per_tensor", x, scale, zero_point, quant_min, quant_max,
                          [&](const QuantizeArgs& args) { return run_forward(x, args); });
}

Tensor fake_quantize_per_channel_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                     int64_t ch_axis, int64_t quant_min, int64_t quant_max) {
  return with_channel_args("fake_quantize_per_channel", x, scale, zero_point, ch_axis, quant_min,
                           quant_max,
                           [&](const QuantizeArgs& args) { return run_forward(x, args); });
}

Tensor fake_quantize_per_tensor_backward_cpu(const Tensor& grad, const Tensor& x,
                                             const Tensor& scale, const Tensor& zero_point,
                                             int64_t quant_min, int64_t quant_max) {
  constexpr const char* op = "fake_quantize_per_tensor_backward";
  check_grad(op, grad, x);
  return with_tensor_args(op, x, scale, zero_point, quant_min, quant_max,
                          [&](const QuantizeArgs& args) { return run_backward(grad, x, args); });
}

Tensor fake_quantize_per_channel_backward_cpu(const Tensor& grad, const Tensor& x,
                                              const Tensor& scale, const Tensor& zero_point,
                                              int64_t ch_axis, int64_t quant_min,
                                              int64_t quant_max) {
  constexpr const char* op = "fake_quantize_per_channel_backward";
  check_grad(op, grad, x);
  return with_channel_args(op, x, scale, zero_point, ch_axis, quant_min, quant_max,
                           [&](const QuantizeArgs& args) { return run_backward(grad, x, args); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "fake_quantize_per_tensor(Tensor x, Tensor scale, Tensor zero_point, int quant_min, "
      "int quant_max) -> Tensor",
      tags);
  m.def(
      "fake_quantize_per_channel(Tensor x, Tensor scale, Tensor zero_point, int ch_axis, "
      "int quant_min, int quant_max) -> Tensor",
      tags);
  m.def(
      "fake_quantize_per_tensor_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, "
      "int quant_min, int quant_max) -> Tensor",
      tags);
  m.def(
      "fake_quantize_per_channel_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, "
      "int ch_axis, int quant_min, int quant_max) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor_meta);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel_meta);
  m.impl("fake_quantize_per_tensor_backward", fake_quantize_per_tensor_backward_meta);
  m.impl("fake_quantize_per_channel_backward", fake_quantize_per_channel_backward_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("fake_quantize_per_tensor", fake_quantize_per_tensor_cpu);
  m.impl("fake_quantize_per_channel", fake_quantize_per_channel_cpu);
  m.impl("fake_quantize_per_tensor_backward", fake_quantize_per_tensor_backward_cpu);
  m.impl("fake_quantize_per_channel_backward", fake_quantize_per_channel_backward_cpu);
}

}  // namespace qtoolkit::ops
