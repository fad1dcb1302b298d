// Fake-quantize with learned parameters: LSQ, LSQ+ and PACT.
#include "kernels/learned.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels/convert.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/straight_through.h"

namespace qtoolkit::ops {
namespace {

using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;

constexpr const char* kLsq = "fake_quantize_lsq";
constexpr const char* kLsqBackward = "fake_quantize_lsq_backward";
constexpr const char* kPact = "fake_quantize_pact";
constexpr const char* kPactBackward = "fake_quantize_pact_backward";

// A learned parameter may cross 0 in an update; below this its size is taken instead.
constexpr float kLeast = 0x1p-100f;

float effective(float learned) { return std::max(std::abs(learned), kLeast); }
float sign_of(float learned) { return std::signbit(learned) ? -1.0f : 1.0f; }

void check_grad(const char* op, const Tensor& grad, const Tensor& x) {
  check_float(op, "grad", grad);
  check_device(op, "grad", grad, x);
  TORCH_CHECK_VALUE(grad.sym_sizes() == x.sym_sizes() && grad.scalar_type() == x.scalar_type(),
                    "qtoolkit::", op, ": grad must have the shape and type of x, got ",
                    describe(grad), " and ", describe(x));
}

// grad is to be overwritten.
void check_grad_inplace(const char* op, const Tensor& grad, const Tensor& x) {
  check_grad(op, grad, x);
  TORCH_CHECK_VALUE(grad.is_contiguous_or_false(x.suggest_memory_format()), "qtoolkit::", op,
                    "_: grad must be dense in the layout of x, got strides ", grad.sym_strides());
}

void check_lsq(const char* op, const Tensor& x, const Tensor& scale,
               const OptionalTensor& zero_point, std::optional<int64_t> ch_axis, int64_t quant_min,
               int64_t quant_max, double grad_scale) {
  check_float(op, "x", x);
  check_quant_range(op, quant_min, quant_max);
  check_parameter(op, "scale", scale, x, ch_axis);
  if (zero_point) {
    check_parameter(op, "zero_point", *zero_point, x, ch_axis);
  } else {
    TORCH_CHECK_VALUE(quant_min <= 0 && quant_max >= 0, "qtoolkit::", op,
                      ": without a zero_point the codes must include 0, got quant_min ", quant_min,
                      " and quant_max ", quant_max);
  }
  TORCH_CHECK_VALUE(std::isfinite(grad_scale), "qtoolkit::", op,
                    ": grad_scale must be finite, got ", grad_scale);
}

void check_pact(const char* op, const Tensor& x, const Tensor& alpha, int64_t quant_max) {
  check_float(op, "x", x);
  check_quant_range(op, 0, quant_max);
  check_parameter(op, "alpha", alpha, x, std::nullopt);
}

std::vector<float> read_finite(const char* op, const char* argument, const Tensor& tensor) {
  const Tensor dense = tensor.contiguous();
  const float* data = dense.const_data_ptr<float>();
  std::vector<float> values(data, data + dense.numel());
  for (const float value : values) {
    TORCH_CHECK_VALUE(std::isfinite(value), "qtoolkit::", op, ": ", argument,
                      " must be finite, got ", value, "; training diverged");
  }
  return values;
}

// What the learned parameters stand for: one element a channel.
struct LsqValues {
  std::vector<float> learned_scale, scale;
  std::vector<int32_t> zero_point;
  ChannelView view;
};

LsqValues read_lsq(const char* op, const Tensor& x, const Tensor& scale,
                   const OptionalTensor& zero_point, std::optional<int64_t> ch_axis,
                   CodeRange range) {
  LsqValues values;
  values.learned_scale = read_finite(op, "scale", scale);
  for (const float learned : values.learned_scale) values.scale.push_back(effective(learned));
  values.zero_point.assign(values.scale.size(), 0);
  if (zero_point) {
    const std::vector<float> learned = read_finite(op, "zero_point", *zero_point);
    for (size_t c = 0; c < learned.size(); ++c) {
      const auto low = static_cast<float>(range.min), high = static_cast<float>(range.max);
      values.zero_point[c] =
          static_cast<int32_t>(std::nearbyint(std::clamp(learned[c], low, high)));
    }
  }
  values.view =
      ch_axis ? channel_view(x.sizes(), check_ch_axis(op, x, *ch_axis), x.suggest_memory_format())
              : ChannelView{.inner = x.numel()};
  return values;
}

Tensor empty_like_x(const Tensor& x) {
  return empty_beside(x, x.sym_sizes(), x.scalar_type(), x.suggest_memory_format());
}

// --- the backward: blocks of a fixed size, each with sums of its own -----------------------------

constexpr int64_t kBlockElements = 2048;

// A block: rows of `channels` elements from `first` on, the first of them of channel `channel`.
struct Block {
  int64_t first, rows, channel, channels;
};

// How memory is cut: into blocks of one channel, or, where channels lie side by side, into blocks
// of all of them.
struct Blocks {
  explicit Blocks(const ChannelView& view) : view(view) {
    const int64_t size = view.outer * view.channels * view.inner;
    across = view.inner == 1 && view.channels > 1;
    rows_in_block = across ? std::max<int64_t>(8, kBlockElements / view.channels) : kBlockElements;
    blocks_in_run = ((across ? view.outer : view.inner) + rows_in_block - 1) / rows_in_block;
    count = size == 0 ? 0 : (across ? 1 : view.outer * view.channels) * blocks_in_run;
  }

  Block operator[](int64_t i) const {
    const int64_t run = i / blocks_in_run, first = i % blocks_in_run * rows_in_block;
    const int64_t rows = std::min(rows_in_block, (across ? view.outer : view.inner) - first);
    if (across) return {first * view.channels, rows, 0, view.channels};
    return {run * view.inner + first, rows, run % view.channels, 1};
  }
  int64_t elements() const { return rows_in_block * sums_in_block(); }
  int64_t sums_in_block() const { return across ? view.channels : 1; }

  ChannelView view;
  bool across;
  int64_t rows_in_block, blocks_in_run, count;
};

// Sums of all channels, from those of the blocks in their order.
std::vector<double> combine(const Blocks& blocks, const std::vector<double>& of_blocks) {
  std::vector<double> sums(static_cast<size_t>(blocks.view.channels), 0.0);
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = blocks[i];
    for (int64_t c = 0; c < block.channels; ++c) {
      sums[block.channel + c] += of_blocks[i * blocks.sums_in_block() + c];
    }
  }
  return sums;
}

// Calls run(args, block, i) for all blocks of tensors of one type and layout; grad_x may be grad.
template <class Run>
void for_each_block(const Tensor& grad_x, const Tensor& grad, const Tensor& x, const Blocks& blocks,
                    const Run& run) {
  const int64_t grain = grain_of(kElementGrain, blocks.elements());
  if (x.scalar_type() == at::kFloat) {
    const float* from_x = x.const_data_ptr<float>();
    const float* from_grad = grad.const_data_ptr<float>();
    float* to = grad_x.mutable_data_ptr<float>();
    at::parallel_for(0, blocks.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Block block = blocks[i];
        run({.channels = block.channels,
             .x = from_x + block.first,
             .grad = from_grad + block.first,
             .grad_x = to + block.first},
            block, i);
      }
    });
    return;
  }
  const bool bfloat16 = x.scalar_type() == at::kBFloat16;
  const auto* from_x = static_cast<const uint16_t*>(x.const_data_ptr());
  const auto* from_grad = static_cast<const uint16_t*>(grad.const_data_ptr());
  auto* to = static_cast<uint16_t*>(grad_x.mutable_data_ptr());
  at::parallel_for(0, blocks.count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> own_x(static_cast<size_t>(blocks.elements())), own_grad(own_x.size());
    for (int64_t i = begin; i < end; ++i) {
      const Block block = blocks[i];
      const int64_t count = block.rows * block.channels;
      kernels::to_float({bfloat16, from_x + block.first, own_x.data()}, 0, count);
      kernels::to_float({bfloat16, from_grad + block.first, own_grad.data()}, 0, count);
      run({.channels = block.channels,
           .x = own_x.data(),
           .grad = own_grad.data(),
           .grad_x = own_grad.data()},
          block, i);
      kernels::from_float(
          {.bfloat16 = bfloat16, .float_in = own_grad.data(), .half_out = to + block.first}, 0,
          count);
    }
  });
}

Tensor gradient_like(const Tensor& learned) {
  return empty_beside(learned, learned.sym_sizes(), at::kFloat, at::MemoryFormat::Contiguous);
}

// A NaN's bits depend on the order of operands, so it is given new ones.
Tensor gradient_of(const Tensor& learned, const std::vector<double>& values) {
  const Tensor result = gradient_like(learned);
  float* to = result.mutable_data_ptr<float>();
  for (size_t c = 0; c < values.size(); ++c) {
    to[c] = std::isnan(values[c]) ? std::numeric_limits<float>::quiet_NaN()
                                  : static_cast<float>(values[c]);
  }
  return result;
}

// --- LSQ

Tensor fake_quantize_lsq_meta(const Tensor& x, const Tensor& scale,
                              const OptionalTensor& zero_point, std::optional<int64_t> ch_axis,
                              int64_t quant_min, int64_t quant_max, double grad_scale) {
  check_lsq(kLsq, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  return empty_like_x(x);
}

Tensor fake_quantize_lsq_cpu(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                             std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max,
                             double grad_scale) {
  check_lsq(kLsq, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  const CodeRange range = check_quant_range(kLsq, quant_min, quant_max);
  const LsqValues values = read_lsq(kLsq, x, scale, zero_point, ch_axis, range);
  const Tensor y = empty_like_x(x);
  fake_quantize_into(y, {}, x.contiguous(x.suggest_memory_format()),
                     {.channels = values.view.channels,
                      .inner = values.view.inner,
                      .group = values.view.inner,
                      .scale = values.scale.data(),
                      .zero_point = values.zero_point.data(),
                      .quant_min = range.min,
                      .quant_max = range.max});
  return y;
}

Tensor no_gradient(const Tensor& x) {
  return empty_beside(x, {c10::SymInt(0)}, at::kFloat, at::MemoryFormat::Contiguous);
}

TensorTriple fake_quantize_lsq_backward_meta(const Tensor& grad, const Tensor& x,
                                             const Tensor& scale, const OptionalTensor& zero_point,
                                             std::optional<int64_t> ch_axis, int64_t quant_min,
                                             int64_t quant_max, double grad_scale) {
  check_lsq(kLsqBackward, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  check_grad(kLsqBackward, grad, x);
  return {empty_like_x(x), gradient_like(scale),
          zero_point ? gradient_like(*zero_point) : no_gradient(x)};
}

TensorPair fake_quantize_lsq_backward_inplace_meta(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
    std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max, double grad_scale) {
  check_lsq(kLsqBackward, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  check_grad_inplace(kLsqBackward, grad, x);
  return {gradient_like(scale), zero_point ? gradient_like(*zero_point) : no_gradient(x)};
}

// Writes grad_x, which may be grad, and returns the gradients of scale and zero_point.
TensorPair lsq_backward(const Tensor& grad_x, const Tensor& grad, const Tensor& x,
                        const Tensor& scale, const OptionalTensor& zero_point,
                        std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max,
                        double grad_scale) {
  const CodeRange range = check_quant_range(kLsqBackward, quant_min, quant_max);
  const LsqValues values = read_lsq(kLsqBackward, x, scale, zero_point, ch_axis, range);
  std::vector<float> inverse, low, high;
  for (const float scale_of_channel : values.scale) inverse.push_back(1.0f / scale_of_channel);
  for (const int32_t z : values.zero_point) {
    low.push_back(static_cast<float>(range.min - z));
    high.push_back(static_cast<float>(range.max - z));
  }
  const Blocks blocks(values.view);
  std::vector<double> scale_parts(static_cast<size_t>(blocks.count * blocks.sums_in_block()));
  std::vector<double> outside_parts(scale_parts.size());
  const at::MemoryFormat format = x.suggest_memory_format();
  for_each_block(grad_x, grad.contiguous(format), x.contiguous(format), blocks,
                 [&](const kernels::SumArgs& sum, const Block& block, int64_t i) {
                   const int64_t part = i * blocks.sums_in_block();
                   kernels::fake_quantize_lsq_backward(
                       {.sum = sum,
                        .inverse_scale = inverse.data() + block.channel,
                        .low = low.data() + block.channel,
                        .high = high.data() + block.channel,
                        .scale_sums = scale_parts.data() + part,
                        .outside_sums = outside_parts.data() + part},
                       0, block.rows);
                 });
  std::vector<double> scale_sums = combine(blocks, scale_parts);
  std::vector<double> outside_sums = combine(blocks, outside_parts);
  for (size_t c = 0; c < scale_sums.size(); ++c) {
    scale_sums[c] *= grad_scale * sign_of(values.learned_scale[c]);
    outside_sums[c] *= -grad_scale * values.scale[c];
  }
  return {gradient_of(scale, scale_sums),
          zero_point ? gradient_of(*zero_point, outside_sums) : no_gradient(x)};
}

TensorTriple fake_quantize_lsq_backward_cpu(const Tensor& grad, const Tensor& x,
                                            const Tensor& scale, const OptionalTensor& zero_point,
                                            std::optional<int64_t> ch_axis, int64_t quant_min,
                                            int64_t quant_max, double grad_scale) {
  check_lsq(kLsqBackward, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  check_grad(kLsqBackward, grad, x);
  const Tensor grad_x = empty_like_x(x);
  const auto [grad_of_scale, grad_of_zero_point] =
      lsq_backward(grad_x, grad, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  return {grad_x, grad_of_scale, grad_of_zero_point};
}

TensorPair fake_quantize_lsq_backward_inplace_cpu(const Tensor& grad, const Tensor& x,
                                                  const Tensor& scale,
                                                  const OptionalTensor& zero_point,
                                                  std::optional<int64_t> ch_axis, int64_t quant_min,
                                                  int64_t quant_max, double grad_scale) {
  check_lsq(kLsqBackward, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  check_grad_inplace(kLsqBackward, grad, x);
  return lsq_backward(grad, grad, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
}

// --- PACT

Tensor fake_quantize_pact_meta(const Tensor& x, const Tensor& alpha, int64_t quant_max) {
  check_pact(kPact, x, alpha, quant_max);
  return empty_like_x(x);
}

Tensor fake_quantize_pact_cpu(const Tensor& x, const Tensor& alpha, int64_t quant_max) {
  check_pact(kPact, x, alpha, quant_max);
  const float scale =
      effective(read_finite(kPact, "alpha", alpha)[0]) / static_cast<float>(quant_max);
  const int32_t zero_point = 0;
  const Tensor y = empty_like_x(x);
  fake_quantize_into(y, {}, x.contiguous(x.suggest_memory_format()),
                     {.scale = &scale,
                      .zero_point = &zero_point,
                      .quant_min = 0,
                      .quant_max = static_cast<int32_t>(quant_max)});
  return y;
}

TensorPair fake_quantize_pact_backward_meta(const Tensor& grad, const Tensor& x,
                                            const Tensor& alpha, int64_t quant_max) {
  check_pact(kPactBackward, x, alpha, quant_max);
  check_grad(kPactBackward, grad, x);
  return {empty_like_x(x), gradient_like(alpha)};
}

Tensor fake_quantize_pact_backward_inplace_meta(const Tensor& grad, const Tensor& x,
                                                const Tensor& alpha, int64_t quant_max) {
  check_pact(kPactBackward, x, alpha, quant_max);
  check_grad_inplace(kPactBackward, grad, x);
  return gradient_like(alpha);
}

// Writes grad_x, which may be grad, and returns the gradient of alpha.
Tensor pact_backward(const Tensor& grad_x, const Tensor& grad, const Tensor& x,
                     const Tensor& alpha) {
  const float learned = read_finite(kPactBackward, "alpha", alpha)[0];
  const Blocks blocks(ChannelView{.inner = x.numel()});
  std::vector<double> parts(static_cast<size_t>(blocks.count));
  const at::MemoryFormat format = x.suggest_memory_format();
  for_each_block(grad_x, grad.contiguous(format), x.contiguous(format), blocks,
                 [&](const kernels::SumArgs& sum, const Block& block, int64_t i) {
                   kernels::fake_quantize_pact_backward(
                       {.sum = sum, .alpha = effective(learned), .alpha_sum = parts.data() + i}, 0,
                       block.rows);
                 });
  return gradient_of(alpha, {combine(blocks, parts)[0] * sign_of(learned)});
}

TensorPair fake_quantize_pact_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                           int64_t quant_max) {
  check_pact(kPactBackward, x, alpha, quant_max);
  check_grad(kPactBackward, grad, x);
  const Tensor grad_x = empty_like_x(x);
  const Tensor grad_alpha = pact_backward(grad_x, grad, x, alpha);
  return {grad_x, grad_alpha};
}

Tensor fake_quantize_pact_backward_inplace_cpu(const Tensor& grad, const Tensor& x,
                                               const Tensor& alpha, int64_t quant_max) {
  check_pact(kPactBackward, x, alpha, quant_max);
  check_grad_inplace(kPactBackward, grad, x);
  return pact_backward(grad, grad, x, alpha);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "fake_quantize_lsq(Tensor x, Tensor scale, Tensor? zero_point, int? ch_axis, int quant_min, "
      "int quant_max, float grad_scale) -> Tensor",
      tags);
  m.def(
      "fake_quantize_lsq_backward(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, "
      "int? ch_axis, int quant_min, int quant_max, float grad_scale) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "fake_quantize_lsq_backward_(Tensor(a!) grad, Tensor x, Tensor scale, Tensor? zero_point, "
      "int? ch_axis, int quant_min, int quant_max, float grad_scale) -> (Tensor, Tensor)",
      tags);
  m.def("fake_quantize_pact(Tensor x, Tensor alpha, int quant_max) -> Tensor", tags);
  m.def(
      "fake_quantize_pact_backward(Tensor grad, Tensor x, Tensor alpha, int quant_max) "
      "-> (Tensor, Tensor)",
      tags);
  m.def(
      "fake_quantize_pact_backward_(Tensor(a!) grad, Tensor x, Tensor alpha, int quant_max) "
      "-> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("fake_quantize_lsq", fake_quantize_lsq_meta);
  m.impl("fake_quantize_lsq_backward", fake_quantize_lsq_backward_meta);
  m.impl("fake_quantize_lsq_backward_", fake_quantize_lsq_backward_inplace_meta);
  m.impl("fake_quantize_pact", fake_quantize_pact_meta);
  m.impl("fake_quantize_pact_backward", fake_quantize_pact_backward_meta);
  m.impl("fake_quantize_pact_backward_", fake_quantize_pact_backward_inplace_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("fake_quantize_lsq", fake_quantize_lsq_cpu);
  m.impl("fake_quantize_lsq_backward", fake_quantize_lsq_backward_cpu);
  m.impl("fake_quantize_lsq_backward_", fake_quantize_lsq_backward_inplace_cpu);
  m.impl("fake_quantize_pact", fake_quantize_pact_cpu);
  m.impl("fake_quantize_pact_backward", fake_quantize_pact_backward_cpu);
  m.impl("fake_quantize_pact_backward_", fake_quantize_pact_backward_inplace_cpu);
}

}  // namespace qtoolkit::ops
