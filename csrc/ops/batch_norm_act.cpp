// Batch norm in training, fused with what follows it in a network that is trained for quantization:
// a residual, the activation, the moving average of the range, and fake-quantize.
#include "ops/batch_norm_act.h"

#include <torch/library.h>

#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>

#include "core/value_range.h"

namespace qtoolkit::ops {

void check_batch_norm_input(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 2, "qtoolkit::", op, ": x must be [N, C] or [N, C, ...], got ",
                    describe(x));
}

void check_batch_norm_channels(const char* op, const char* argument, const OptionalTensor& tensor,
                               const Tensor& x) {
  if (!tensor) return;
  check_dtype(op, argument, *tensor, at::kFloat);
  check_device(op, argument, *tensor, x);
  TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->sym_size(0) == x.sym_size(1), "qtoolkit::", op,
                    ": ", argument, " must hold one element for each of ", x.sym_size(1),
                    " channels, got ", describe(*tensor));
}

std::vector<double> channel_values(const OptionalTensor& tensor, int64_t channels, double missing) {
  std::vector<double> values(static_cast<size_t>(channels), missing);
  if (!tensor) return values;
  const Tensor dense = tensor->contiguous();
  const auto* data = dense.const_data_ptr<float>();
  std::copy_n(data, channels, values.begin());
  return values;
}

ChannelNumbers::ChannelNumbers(const ChannelView& view)
    : channels_(view.channels), period_(view.channels), repeated_(view.inner == 1) {
  constexpr int64_t kStep = kernels::kBatchNormStep;
  if (channels_ > 0) period_ = (kStep + channels_ - 1) / channels_ * channels_;
}

std::vector<float> ChannelNumbers::spread(const std::vector<float>& values) const {
  if (!repeated_ || values.empty()) return values;
  std::vector<float> result(static_cast<size_t>(period_ + kernels::kBatchNormStep));
  for (size_t i = 0; i < result.size(); ++i) result[i] = values[i % values.size()];
  return result;
}

std::vector<SumPiece> sum_pieces(const ChannelView& view) {
  if (view.inner > 1) return {{.view = view, .parts = view.outer * view.channels}};
  constexpr int64_t kStep = kernels::kBatchNormStep;
  constexpr int64_t kPart = int64_t{1} << 15, kMostParts = 128, kLeastRows = 16;
  const int64_t fold = kStep / std::gcd(view.channels, kStep);
  SumPiece main{.view = {view.outer / fold, view.channels * fold, 1}};
  const int64_t part = std::max(kPart, view.outer * view.channels / kMostParts);
  main.part_rows = std::max(kLeastRows, part / main.view.channels);
  main.parts = (main.view.outer + main.part_rows - 1) / main.part_rows;
  SumPiece rest{.view = {view.outer % fold, view.channels, 1},
                .first_element = main.view.outer * main.view.channels,
                .part_rows = fold,
                .parts = 1};
  return rest.view.outer == 0 ? std::vector{main} : std::vector{main, rest};
}

namespace {

constexpr const char* kOp = "batch_norm_act";
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Activation {
  bool relu = false;
  std::optional<double> upper;
};

// Where the result is fake-quantized.
struct Quantization {
  OptionalTensor min_val, max_val, scale, zero_point;
  float averaging_constant = 0.0f;
  bool symmetric = false;
  CodeRange codes;
  bool observed() const { return averaging_constant > 0.0f; }
};

void check_state(const char* argument, const OptionalTensor& tensor, const Tensor& x) {
  if (!tensor) return;
  check_dtype(kOp, argument, *tensor, at::kFloat);
  check_device(kOp, argument, *tensor, x);
  TORCH_CHECK_VALUE(tensor->sym_numel() == 1, "qtoolkit::", kOp, ": ", argument,
                    " must hold one element, got ", describe(*tensor));
}

void check_args(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& running_mean, const OptionalTensor& running_var,
                const OptionalTensor& residual, bool training, const Activation& activation,
                const Quantization& quantization) {
  check_batch_norm_input(kOp, x);
  check_batch_norm_channels(kOp, "weight", weight, x);
  check_batch_norm_channels(kOp, "bias", bias, x);
  check_batch_norm_channels(kOp, "running_mean", running_mean, x);
  check_batch_norm_channels(kOp, "running_var", running_var, x);
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(), "qtoolkit::", kOp,
                    ": running_mean and running_var must both be given or both be None");
  TORCH_CHECK_VALUE(training || running_mean, "qtoolkit::", kOp,
                    ": running_mean and running_var are needed where training is False");
  if (residual) {
    check_float(kOp, "residual", *residual);
    check_device(kOp, "residual", *residual, x);
    TORCH_CHECK_VALUE(residual->sym_sizes() == x.sym_sizes(), "qtoolkit::", kOp,
                      ": residual must have the shape of x, got ", describe(*residual), " and ",
                      describe(x));
  }
  TORCH_CHECK_VALUE(!activation.upper || (activation.relu && *activation.upper > 0),
                    "qtoolkit::", kOp,
                    ": upper must be positive and goes with relu=True, got upper ",
                    activation.upper.value_or(0), " and relu ", activation.relu);
  const Quantization& q = quantization;
  TORCH_CHECK_VALUE(q.averaging_constant >= 0.0f && q.averaging_constant <= 1.0f, "qtoolkit::", kOp,
                    ": averaging_constant must lie in [0, 1], got ", q.averaging_constant);
  TORCH_CHECK_VALUE(q.scale.has_value() == q.zero_point.has_value(), "qtoolkit::", kOp,
                    ": scale and zero_point must both be given or both be None");
  TORCH_CHECK_VALUE(q.min_val.has_value() == q.max_val.has_value(), "qtoolkit::", kOp,
                    ": min_val and max_val must both be given or both be None");
  if (!q.scale) return;
  check_qparams(kOp, "", *q.scale, *q.zero_point, x);
  check_state("min_val", q.min_val, x);
  check_state("max_val", q.max_val, x);
  TORCH_CHECK_VALUE(!q.observed() || q.min_val, "qtoolkit::", kOp,
                    ": min_val and max_val are needed where averaging_constant is above 0; with 0 "
                    "the range is frozen");
}

Outputs empty_outputs(const Tensor& x, bool masked) {
  const auto contiguous = at::MemoryFormat::Contiguous;
  const c10::SymInt channels = x.sym_size(1);
  return {empty_beside(x, x.sym_sizes(), x.scalar_type(), x.suggest_memory_format()),
          empty_beside(x, {channels}, at::kFloat, contiguous),
          empty_beside(x, {channels}, at::kFloat, contiguous),
          empty_beside(x, {masked ? mask_size(x) : c10::SymInt(0)}, at::kByte, contiguous)};
}

// Of every channel, over the elements of a tensor.
struct ChannelStatistics {
  std::vector<double> mean, variance;  // the variance is biased
  std::vector<float> extremes;         // minimum of each channel, then maximum of each
};

ChannelStatistics channel_statistics(const float* x, const ChannelView& view) {
  const auto channels = static_cast<size_t>(view.channels);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  ChannelStatistics result{std::vector<double>(channels), std::vector<double>(channels),
                           std::vector<float>(2 * channels, kInf)};
  std::fill_n(result.extremes.begin() + view.channels, channels, -kInf);
  for (const SumPiece& piece : sum_pieces(view)) {
    const auto size = static_cast<size_t>(piece.results());
    std::vector<double> sum(size), squares(size);
    std::vector<float> minimum(size), maximum(size);
    const kernels::BatchNormStatisticsArgs args{.x = x + piece.first_element,
                                                .outer = piece.view.outer,
                                                .channels = piece.view.channels,
                                                .inner = piece.view.inner,
                                                .part_rows = piece.part_rows,
                                                .sum = sum.data(),
                                                .squares = squares.data(),
                                                .minimum = minimum.data(),
                                                .maximum = maximum.data()};
    at::parallel_for(
        0, piece.parts, grain_of(kElementGrain, piece.elements_of_part()),
        [&](int64_t begin, int64_t end) { kernels::batch_norm_statistics(args, begin, end); });
    for (size_t r = 0; r < size; ++r) {
      const size_t c = r % channels;
      result.mean[c] += sum[r];
      result.variance[c] += squares[r];
      result.extremes[c] = std::min(result.extremes[c], minimum[r]);
      result.extremes[channels + c] = std::max(result.extremes[channels + c], maximum[r]);
    }
  }
  const auto count = static_cast<double>(view.outer * view.inner);
  for (size_t c = 0; c < channels; ++c) {
    const double mean = result.mean[c] / count;
    const double variance = (result.variance[c] - mean * result.mean[c]) / count;
    result.mean[c] = mean;
    result.variance[c] = variance < 0.0 ? 0.0 : variance;  // NaN stays
  }
  return result;
}

// running = (1 - momentum) * running + momentum * batch
void update_running(const Tensor& running, const std::vector<double>& batch, double momentum,
                    double factor) {
  auto values = running.accessor<float, 1>();
  for (int64_t c = 0; c < running.numel(); ++c) {
    values[c] = static_cast<float>((1.0 - momentum) * double{values[c]} +
                                   momentum * (batch[static_cast<size_t>(c)] * factor));
  }
}

// The range of what `args` makes, over `elements` elements.
ValueRange range_of(const kernels::BatchNormArgs& args, int64_t elements) {
  ValueRange range;
  std::mutex mutex;
  for_element_blocks(elements, Order::backwards, [&](int64_t begin, int64_t end) {
    ValueRange own;
    kernels::BatchNormArgs block = args;
    block.minimum = &own.min;
    block.maximum = &own.max;
    kernels::batch_norm_range(block, begin, end);
    const std::lock_guard lock(mutex);
    // NaN in either stays.
    range.min = own.min < range.min || std::isnan(own.min) ? own.min : range.min;
    range.max = own.max > range.max || std::isnan(own.max) ? own.max : range.max;
  });
  return range;
}

ValueRange state_of(const Quantization& q) {
  if (!q.min_val) return {0.0f, 0.0f};
  return {*q.min_val->const_data_ptr<float>(), *q.max_val->const_data_ptr<float>()};
}

// Before anything is changed.
void check_range(ValueRange range) {
  TORCH_CHECK_VALUE(!range.seen() || range.finite(), "qtoolkit::", kOp,
                    ": min_val and max_val must be finite, or +Inf and -Inf before any data, got ",
                    range.min, " and ", range.max);
}

void observe(const Quantization& q, ValueRange batch) {
  if (!batch.finite()) return;
  const ValueRange range = moving_average(state_of(q), batch, q.averaging_constant);
  const auto [scale, zero_point] = range_to_qparams(range, q.symmetric, q.codes.min, q.codes.max);
  *q.min_val->mutable_data_ptr<float>() = range.min;
  *q.max_val->mutable_data_ptr<float>() = range.max;
  *q.scale->mutable_data_ptr<float>() = scale;
  *q.zero_point->mutable_data_ptr<int32_t>() = zero_point;
}

QParams read_scale(const Quantization& q) {
  const QParams result = read_qparams(kOp, "", *q.scale, *q.zero_point, q.codes);
  TORCH_CHECK_VALUE(std::isfinite(1.0f / result.scale), "qtoolkit::", kOp,
                    ": scale is so small that its inverse overflows float32, got ", result.scale);
  return result;
}

Outputs batch_norm_act_run(const Tensor& x, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, const OptionalTensor& residual,
                           bool training, double momentum, double eps, const Activation& activation,
                           const Quantization& quantization) {
  check_args(x, weight, bias, running_mean, running_var, residual, training, activation,
             quantization);
  const ChannelView view = batch_norm_view(x);
  const auto channels = static_cast<size_t>(view.channels);
  const int64_t count = view.outer * view.inner, elements = x.numel();
  TORCH_CHECK_VALUE(!training || (count > 1 && elements > 0), "qtoolkit::", kOp,
                    ": needs more than one value for each channel in training, got ", describe(x));
  const bool quantize = quantization.scale.has_value();
  const bool observed = quantize && quantization.observed();
  if (observed) check_range(state_of(quantization));
  if (quantize && !observed && state_of(quantization).seen()) read_scale(quantization);

  const bool masked = quantize || activation.relu;
  Outputs outputs = empty_outputs(x, masked);
  auto& [y, mean_out, invstd_out, mask] = outputs;
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor dense = x.to(at::kFloat).contiguous(format);
  const Tensor dense_residual = residual ? residual->to(at::kFloat).contiguous(format) : Tensor();
  const Tensor result =
      y.scalar_type() == at::kFloat ? y : empty_beside(x, x.sym_sizes(), at::kFloat, format);

  ChannelStatistics statistics;
  if (training) {
    statistics = channel_statistics(dense.const_data_ptr<float>(), view);
    if (running_mean) {
      const auto n = static_cast<double>(count);
      update_running(*running_mean, statistics.mean, momentum, 1.0);
      update_running(*running_var, statistics.variance, momentum, n / (n - 1.0));
    }
  } else {
    statistics.mean = channel_values(running_mean, view.channels, 0.0);
    statistics.variance = channel_values(running_var, view.channels, 1.0);
  }
  const std::vector<double> weights = channel_values(weight, view.channels, 1.0);
  const std::vector<double> biases = channel_values(bias, view.channels, 0.0);
  std::vector<float> factor(channels), addend(channels);
  auto* means = mean_out.mutable_data_ptr<float>();
  auto* invstds = invstd_out.mutable_data_ptr<float>();
  for (size_t c = 0; c < channels; ++c) {
    const double mean = statistics.mean[c];
    const double invstd = 1.0 / std::sqrt(statistics.variance[c] + eps);
    means[c] = static_cast<float>(mean);
    invstds[c] = static_cast<float>(invstd);
    factor[c] = static_cast<float>(weights[c] * invstd);
    addend[c] = static_cast<float>(biases[c] - mean * double{factor[c]});
  }

  constexpr float kInf = std::numeric_limits<float>::infinity();
  const ChannelNumbers numbers(view);
  const std::vector<float> factors = numbers.spread(factor), addends = numbers.spread(addend);
  kernels::BatchNormArgs args{
      .outer = view.outer,
      .channels = view.channels,
      .inner = view.inner,
      .period = numbers.period(),
      .factor = factors.data(),
      .addend = addends.data(),
      .x = dense.const_data_ptr<float>(),
      .residual = residual ? dense_residual.const_data_ptr<float>() : nullptr,
      .lower = activation.relu ? 0.0f : -kInf,
      .upper = static_cast<float>(activation.upper.value_or(kInf)),
      .y = result.mutable_data_ptr<float>(),
      .mask = masked ? mask.mutable_data_ptr<uint8_t>() : nullptr};
  Order order = Order::backwards;
  if (observed && elements > 0) {
    if (training && !residual) {
      // The map is monotone, so it takes a channel's extremes to the result's.
      const ChannelView two_rows{2, view.channels, 1};
      const ChannelNumbers of_two_rows(two_rows);
      const std::vector<float> row_factors = of_two_rows.spread(factor);
      const std::vector<float> row_addends = of_two_rows.spread(addend);
      kernels::BatchNormArgs extremes = args;
      extremes.outer = 2;
      extremes.inner = 1;
      extremes.period = of_two_rows.period();
      extremes.factor = row_factors.data();
      extremes.addend = row_addends.data();
      extremes.x = statistics.extremes.data();
      observe(quantization, range_of(extremes, 2 * view.channels));
    } else {
      observe(quantization, range_of(args, elements));
      order = Order::forwards;
    }
  }
  args.quantized = quantize && state_of(quantization).seen();
  if (args.quantized) {
    const QParams qparams = read_scale(quantization);
    args.scale = qparams.scale;
    args.zero_point = qparams.zero_point;
    args.quant_min = quantization.codes.min;
    args.quant_max = quantization.codes.max;
  }
  for_element_blocks(elements, order, [&](int64_t begin, int64_t end) {
    kernels::batch_norm_act(args, begin, end);
  });
  if (!result.is_same(y)) y.copy_(result);
  return outputs;
}

Quantization quantization_of(const OptionalTensor& min_val, const OptionalTensor& max_val,
                             const OptionalTensor& scale, const OptionalTensor& zero_point,
                             double averaging_constant, bool symmetric, int64_t quant_min,
                             int64_t quant_max) {
  return {min_val,
          max_val,
          scale,
          zero_point,
          static_cast<float>(averaging_constant),
          symmetric,
          scale ? check_quant_range(kOp, quant_min, quant_max) : CodeRange{}};
}

Outputs batch_norm_act_meta(const Tensor& x, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const OptionalTensor& residual,
                            bool training, double /*momentum*/, double /*eps*/, bool relu,
                            std::optional<double> upper, const OptionalTensor& min_val,
                            const OptionalTensor& max_val, const OptionalTensor& scale,
                            const OptionalTensor& zero_point, double averaging_constant,
                            bool symmetric, int64_t quant_min, int64_t quant_max) {
  check_args(x, weight, bias, running_mean, running_var, residual, training, {relu, upper},
             quantization_of(min_val, max_val, scale, zero_point, averaging_constant, symmetric,
                             quant_min, quant_max));
  return empty_outputs(x, relu || scale.has_value());
}

Outputs batch_norm_act_cpu(const Tensor& x, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, const OptionalTensor& residual,
                           bool training, double momentum, double eps, bool relu,
                           std::optional<double> upper, const OptionalTensor& min_val,
                           const OptionalTensor& max_val, const OptionalTensor& scale,
                           const OptionalTensor& zero_point, double averaging_constant,
                           bool symmetric, int64_t quant_min, int64_t quant_max) {
  return batch_norm_act_run(x, weight, bias, running_mean, running_var, residual, training,
                            momentum, eps, {relu, upper},
                            quantization_of(min_val, max_val, scale, zero_point, averaging_constant,
                                            symmetric, quant_min, quant_max));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? residual, bool training, float momentum, float eps, "
      "bool relu, float? upper, Tensor(c!)? min_val, Tensor(d!)? max_val, Tensor(e!)? scale, "
      "Tensor(f!)? zero_point, float averaging_constant, bool symmetric, int quant_min, "
      "int quant_max) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("batch_norm_act", batch_norm_act_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("batch_norm_act", batch_norm_act_cpu); }

}  // namespace qtoolkit::ops
