// Fake-quantize with learned parameters: LSQ, LSQ+ and PACT.
#include "kernels/learned.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels/quantize.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

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

void check_learned(const char* op, const char* argument, const Tensor& learned, const Tensor& x,
                   std::optional<int64_t> ch_axis) {
  check_dtype(op, argument, learned, at::kFloat);
  check_device(op, argument, learned, x);
  if (!ch_axis) {
    TORCH_CHECK_VALUE(learned.sym_numel() == 1, "qtoolkit::", op, ": ", argument,
                      " must hold one element, got ", learned.sym_sizes(),
                      "; give ch_axis for one element a channel");
    return;
  }
  const c10::SymInt channels = x.sym_size(check_ch_axis(op, x, *ch_axis));
  TORCH_CHECK_VALUE(learned.dim() == 1 && learned.sym_size(0) == channels, "qtoolkit::", op, ": ",
                    argument, " must hold one element for each of ", channels, " channels, got ",
                    learned.sym_sizes());
}

void check_grad(const char* op, const Tensor& grad, const Tensor& x) {
  check_float(op, "grad", grad);
  check_device(op, "grad", grad, x);
  TORCH_CHECK_VALUE(grad.sym_sizes() == x.sym_sizes(), "qtoolkit::", op,
                    ": grad must have the shape of x, got ", describe(grad), " and ", describe(x));
}

void check_lsq(const char* op, const Tensor& x, const Tensor& scale,
               const OptionalTensor& zero_point, std::optional<int64_t> ch_axis, int64_t quant_min,
               int64_t quant_max, double grad_scale) {
  check_float(op, "x", x);
  check_quant_range(op, quant_min, quant_max);
  check_learned(op, "scale", scale, x, ch_axis);
  if (zero_point) {
    check_learned(op, "zero_point", *zero_point, x, ch_axis);
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
  check_learned(op, "alpha", alpha, x, std::nullopt);
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

Tensor empty_like_x(const Tensor& x, at::ScalarType dtype) {
  return empty_beside(x, x.sym_sizes(), dtype, x.suggest_memory_format());
}

Tensor run_forward(const Tensor& x, kernels::QuantizeArgs args) {
  const Tensor dense = x.to(at::kFloat).contiguous(x.suggest_memory_format());
  const Tensor y = empty_like_x(x, at::kFloat);
  args.x = dense.const_data_ptr<float>();
  args.y = y.mutable_data_ptr<float>();
  at::parallel_for(0, x.numel(), kElementGrain,
                   [&](int64_t begin, int64_t end) { kernels::fake_quantize(args, begin, end); });
  return y.to(x.scalar_type());
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

// Calls run(args, block, i) for all blocks.
template <class Run>
Tensor for_each_block(const Tensor& grad, const Tensor& x, const Blocks& blocks, const Run& run) {
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor dense = x.to(at::kFloat).contiguous(format);
  const Tensor dense_grad = grad.to(at::kFloat).contiguous(format);
  const Tensor grad_x = empty_like_x(x, at::kFloat);
  const float* from_x = dense.const_data_ptr<float>();
  const float* from_grad = dense_grad.const_data_ptr<float>();
  float* to = grad_x.mutable_data_ptr<float>();
  at::parallel_for(0, blocks.count, grain_of(kElementGrain, blocks.elements()),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const Block block = blocks[i];
                       run({.channels = block.channels,
                            .x = from_x + block.first,
                            .grad = from_grad + block.first,
                            .grad_x = to + block.first},
                           block, i);
                     }
                   });
  return grad_x.to(x.scalar_type());
}

// A float32 tensor like `learned`. A NaN's bits depend on the order of operands, so it is given
// new ones.
Tensor gradient_of(const Tensor& learned, const std::vector<double>& values) {
  const Tensor result =
      empty_beside(learned, learned.sym_sizes(), at::kFloat, at::MemoryFormat::Contiguous);
  float* to = result.mutable_data_ptr<float>();
  for (size_t c = 0; c < values.size(); ++c) {
    to[c] = std::isnan(values[c]) ? std::numeric_limits<float>::quiet_NaN()
                                  : static_cast<float>(values[c]);
  }
  return result;
}

// --- LSQ
// ------------------------------------------------------------------------------------------

Tensor fake_quantize_lsq_meta(const Tensor& x, const Tensor& scale,
                              const OptionalTensor& zero_point, std::optional<int64_t> ch_axis,
                              int64_t quant_min, int64_t quant_max, double grad_scale) {
  check_lsq(kLsq, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  return empty_like_x(x, x.scalar_type());
}

Tensor fake_quantize_lsq_cpu(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                             std::optional<int64_t> ch_axis, int64_t quant_min, int64_t quant_max,
                             double grad_scale) {
  check_lsq(kLsq, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  const CodeRange range = check_quant_range(kLsq, quant_min, quant_max);
  const LsqValues values = read_lsq(kLsq, x, scale, zero_point, ch_axis, range);
  return run_forward(x, {.channels = values.view.channels,
                         .inner = values.view.inner,
                         .scale = values.scale.data(),
                         .zero_point = values.zero_point.data(),
                         .quant_min = range.min,
                         .quant_max = range.max});
}

TensorTriple fake_quantize_lsq_backward_meta(const Tensor& grad, const Tensor& x,
                                             const Tensor& scale, const OptionalTensor& zero_point,
                                             std::optional<int64_t> ch_axis, int64_t quant_min,
                                             int64_t quant_max, double grad_scale) {
  check_lsq(kLsqBackward, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  check_grad(kLsqBackward, grad, x);
  const auto format = at::MemoryFormat::Contiguous;
  return {empty_like_x(x, x.scalar_type()),
          empty_beside(scale, scale.sym_sizes(), at::kFloat, format),
          zero_point ? empty_beside(scale, zero_point->sym_sizes(), at::kFloat, format)
                     : empty_beside(scale, {c10::SymInt(0)}, at::kFloat, format)};
}

TensorTriple fake_quantize_lsq_backward_cpu(const Tensor& grad, const Tensor& x,
                                            const Tensor& scale, const OptionalTensor& zero_point,
                                            std::optional<int64_t> ch_axis, int64_t quant_min,
                                            int64_t quant_max, double grad_scale) {
  check_lsq(kLsqBackward, x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale);
  check_grad(kLsqBackward, grad, x);
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
  const Tensor grad_x =
      for_each_block(grad, x, blocks, [&](kernels::SumArgs sum, const Block& block, int64_t i) {
        const int64_t part = i * blocks.sums_in_block();
        kernels::fake_quantize_lsq_backward({.sum = sum,
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
  return {grad_x, gradient_of(scale, scale_sums),
          zero_point
              ? gradient_of(*zero_point, outside_sums)
              : empty_beside(scale, {c10::SymInt(0)}, at::kFloat, at::MemoryFormat::Contiguous)};
}

// --- PACT
// -----------------------------------------------------------------------------------------

Tensor fake_quantize_pact_meta(const Tensor& x, const Tensor& alpha, int64_t quant_max) {
  check_pact(kPact, x, alpha, quant_max);
  return empty_like_x(x, x.scalar_type());
}

Tensor fake_quantize_pact_cpu(const Tensor& x, const Tensor& alpha, int64_t quant_max) {
  check_pact(kPact, x, alpha, quant_max);
  const float scale =
      effective(read_finite(kPact, "alpha", alpha)[0]) / static_cast<float>(quant_max);
  const int32_t zero_point = 0;
  return run_forward(x, {.inner = x.numel(),
                         .scale = &scale,
                         .zero_point = &zero_point,
                         .quant_min = 0,
                         .quant_max = static_cast<int32_t>(quant_max)});
}

TensorPair fake_quantize_pact_backward_meta(const Tensor& grad, const Tensor& x,
                                            const Tensor& alpha, int64_t quant_max) {
  check_pact(kPactBackward, x, alpha, quant_max);
  check_grad(kPactBackward, grad, x);
  return {empty_like_x(x, x.scalar_type()),
          empty_beside(alpha, alpha.sym_sizes(), at::kFloat, at::MemoryFormat::Contiguous)};
}

TensorPair fake_quantize_pact_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& alpha,
                                           int64_t quant_max) {
  check_pact(kPactBackward, x, alpha, quant_max);
  check_grad(kPactBackward, grad, x);
  const float learned = read_finite(kPactBackward, "alpha", alpha)[0];
  const Blocks blocks(ChannelView{.inner = x.numel()});
  std::vector<double> parts(static_cast<size_t>(blocks.count));
  const Tensor grad_x =
      for_each_block(grad, x, blocks, [&](kernels::SumArgs sum, const Block& block, int64_t i) {
        kernels::fake_quantize_pact_backward(
            {.sum = sum, .alpha = effective(learned), .alpha_sum = parts.data() + i}, 0,
            block.rows);
      });
  const double total = combine(blocks, parts)[0];
  return {grad_x, gradient_of(alpha, {total * sign_of(learned)})};
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
  m.def("fake_quantize_pact(Tensor x, Tensor alpha, int quant_max) -> Tensor", tags);
  m.def(
      "fake_quantize_pact_backward(Tensor grad, Tensor x, Tensor alpha, int quant_max) "
      "-> (Tensor, Tensor)",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("fake_quantize_lsq", fake_quantize_lsq_meta);
  m.impl("fake_quantize_lsq_backward", fake_quantize_lsq_backward_meta);
  m.impl("fake_quantize_pact", fake_quantize_pact_meta);
  m.impl("fake_quantize_pact_backward", fake_quantize_pact_backward_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("fake_quantize_lsq", fake_quantize_lsq_cpu);
  m.impl("fake_quantize_lsq_backward", fake_quantize_lsq_backward_cpu);
  m.impl("fake_quantize_pact", fake_quantize_pact_cpu);
  m.impl("fake_quantize_pact_backward", fake_quantize_pact_backward_cpu);
}

}  // namespace qtoolkit::ops
