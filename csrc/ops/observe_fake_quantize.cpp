// Moving-average observation and fake-quantization in one operator: the range of x moves the
// running one, whose scale and zero point then quantize x.
#include <torch/library.h>

#include <tuple>

#include "core/value_range.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/statistics.h"
#include "ops/straight_through.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "observe_fake_quantize";

// What is known of the tensor's range, changed in place.
struct State {
  const Tensor &min_val, &max_val, &scale, &zero_point;
};

struct Options {
  double averaging_constant;
  int64_t quant_min, quant_max;
  bool symmetric;
};

Tensor result_meta(const Tensor& x, const State& state, const Options& options) {
  check_float(kOp, "x", x);
  TORCH_CHECK_VALUE(x.sym_numel() != 0, "qtoolkit::", kOp, ": x is empty, ", describe(x),
                    "; it has no range");
  check_quant_range(kOp, options.quant_min, options.quant_max);
  TORCH_CHECK_VALUE(options.averaging_constant > 0 && options.averaging_constant <= 1,
                    "qtoolkit::", kOp, ": averaging_constant must be above 0 and at most 1, got ",
                    options.averaging_constant);
  check_qparams(kOp, "", state.scale, state.zero_point, x);
  for (const auto& [name, bound] :
       {std::pair{"min_val", state.min_val}, std::pair{"max_val", state.max_val}}) {
    check_dtype(kOp, name, bound, at::kFloat);
    check_device(kOp, name, bound, x);
    TORCH_CHECK_VALUE(bound.sym_numel() == 1, "qtoolkit::", kOp, ": ", name,
                      " must hold one element, got ", describe(bound));
  }
  return empty_beside(x, x.sym_sizes(), x.scalar_type(), x.suggest_memory_format());
}

// y, and the mask if it is defined.
Tensor run(const Tensor& x, const State& state, const Options& options, const Tensor& mask) {
  const Tensor y = result_meta(x, state, options);
  const CodeRange codes = check_quant_range(kOp, options.quant_min, options.quant_max);
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  auto& min_val = *state.min_val.mutable_data_ptr<float>();
  auto& max_val = *state.max_val.mutable_data_ptr<float>();
  const ValueRange range = moving_average({min_val, max_val}, range_of(dense),
                                          static_cast<float>(options.averaging_constant));
  if (!range.seen()) {
    y.copy_(x);
    const int64_t rest = x.numel() % 8;
    if (mask.defined()) {
      mask.fill_(255);
      if (rest != 0) mask.mutable_data_ptr<uint8_t>()[x.numel() / 8] = (1 << rest) - 1;
    }
    return y;
  }
  TORCH_CHECK_VALUE(range.finite(), "qtoolkit::", kOp,
                    ": min_val and max_val must be finite, or +Inf and -Inf before any data, got ",
                    range.min, " and ", range.max);
  const auto [scale, zero_point] = range_to_qparams(range, options.symmetric, codes.min, codes.max);
  min_val = range.min;
  max_val = range.max;
  *state.scale.mutable_data_ptr<float>() = scale;
  *state.zero_point.mutable_data_ptr<int32_t>() = zero_point;
  fake_quantize_into(
      y, mask, dense,
      {.scale = &scale, .zero_point = &zero_point, .quant_min = codes.min, .quant_max = codes.max});
  return y;
}

Tensor observe_fake_quantize_meta(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
                                  const Tensor& scale, const Tensor& zero_point,
                                  double averaging_constant, int64_t quant_min, int64_t quant_max,
                                  bool symmetric) {
  return result_meta(x, {min_val, max_val, scale, zero_point},
                     {averaging_constant, quant_min, quant_max, symmetric});
}

std::tuple<Tensor, Tensor> observe_fake_quantize_mask_meta(
    const Tensor& x, const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
    const Tensor& zero_point, double averaging_constant, int64_t quant_min, int64_t quant_max,
    bool symmetric) {
  const Tensor y = result_meta(x, {min_val, max_val, scale, zero_point},
                               {averaging_constant, quant_min, quant_max, symmetric});
  return {y, empty_mask(x)};
}

Tensor observe_fake_quantize_cpu(const Tensor& x, const Tensor& min_val, const Tensor& max_val,
                                 const Tensor& scale, const Tensor& zero_point,
                                 double averaging_constant, int64_t quant_min, int64_t quant_max,
                                 bool symmetric) {
  return run(x, {min_val, max_val, scale, zero_point},
             {averaging_constant, quant_min, quant_max, symmetric}, {});
}

std::tuple<Tensor, Tensor> observe_fake_quantize_mask_cpu(
    const Tensor& x, const Tensor& min_val, const Tensor& max_val, const Tensor& scale,
    const Tensor& zero_point, double averaging_constant, int64_t quant_min, int64_t quant_max,
    bool symmetric) {
  const Tensor mask = empty_mask(x);
  const Tensor y = run(x, {min_val, max_val, scale, zero_point},
                       {averaging_constant, quant_min, quant_max, symmetric}, mask);
  return {y, mask};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  m.def(
      "observe_fake_quantize(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) scale, "
      "Tensor(d!) zero_point, float averaging_constant, int quant_min, int quant_max, "
      "bool symmetric) -> Tensor",
      tags);
  m.def(
      "observe_fake_quantize_mask(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, "
      "Tensor(c!) scale, Tensor(d!) zero_point, float averaging_constant, int quant_min, "
      "int quant_max, bool symmetric) -> (Tensor y, Tensor mask)",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("observe_fake_quantize", observe_fake_quantize_meta);
  m.impl("observe_fake_quantize_mask", observe_fake_quantize_mask_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("observe_fake_quantize", observe_fake_quantize_cpu);
  m.impl("observe_fake_quantize_mask", observe_fake_quantize_mask_cpu);
}

}  // namespace qtoolkit::ops
