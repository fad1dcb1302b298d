// The fully connected layer on float rows that are quantized here, each by its own range.
#include <torch/library.h>

#include <array>
#include <cstddef>
#include <string_view>

#include "kernels/kernels.h"
#include "ops/aligned_buffer.h"
#include "ops/checks.h"
#include "ops/code_product.h"
#include "ops/conv_args.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/weight_cache.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "linear_dynamic";

Activation activation_of(std::string_view name) {
  constexpr std::array<std::pair<std::string_view, Activation>, 5> kNames = {
      {{"none", Activation::none},
       {"relu", Activation::relu},
       {"gelu", Activation::gelu},
       {"gelu_tanh", Activation::gelu_tanh},
       {"silu", Activation::silu}}};
  const auto* const known = std::ranges::find(kNames, name, &decltype(kNames)::value_type::first);
  TORCH_CHECK_VALUE(known != kNames.end(),
                    "qtoolkit::linear_dynamic: activation must be \"none\", \"relu\", \"gelu\", "
                    "\"gelu_tanh\" or \"silu\", got \"",
                    name, "\"");
  return known->second;
}

Tensor linear_dynamic_meta(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                           const OptionalTensor& bias, std::string_view activation) {
  check_float(kOp, "x", x);
  check_rank(kOp, "weight", weight, 2);
  check_weight(kOp, x, weight, weight_scale, std::nullopt);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) == weight.sym_size(1) && x.sym_size(-1) > 0,
                    "qtoolkit::linear_dynamic: the last dimension of x ", describe(x),
                    " must be that of weight ", describe(weight), " and not empty");
  if (bias) {
    check_dtype(kOp, "bias", *bias, at::kFloat);
    check_device(kOp, "bias", *bias, x);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0),
                      "qtoolkit::linear_dynamic: bias must hold one element for each of ",
                      weight.sym_size(0), " output channels, got ", describe(*bias));
  }
  activation_of(activation);
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return empty_beside(x, sizes, x.scalar_type(), at::MemoryFormat::Contiguous);
}

// Rows as codes with their scales and zero points.
class Rows {
 public:
  Rows(const Tensor& x, int64_t rows, int64_t width)
      : width_(width),
        stride_(spread_stride(width)),
        codes_(aligned_buffer<uint8_t>(rows * stride_ + kernels::kOverread)),
        scale_(static_cast<size_t>(rows)),
        zero_point_(static_cast<size_t>(rows)) {
    at::parallel_for(0, rows, grain_of(kElementGrain, width),
                     [&](int64_t begin, int64_t end) { quantize(x, begin, end); });
  }

  int64_t stride() const { return stride_; }
  const uint8_t* codes() const { return codes_.get(); }
  const float* scale(int64_t row) const { return scale_.data() + row; }
  const int32_t* zero_point(int64_t row) const { return zero_point_.data() + row; }

 private:
  void quantize(const Tensor& x, int64_t begin, int64_t end) {
    kernels::QuantizeRowsArgs args{.width = width_,
                                   .x_row_stride = width_,
                                   .codes = codes_.get(),
                                   .codes_row_stride = stride_,
                                   .scale = scale_.data(),
                                   .zero_point = zero_point_.data()};
    if (x.scalar_type() == at::kFloat) {
      args.x = x.const_data_ptr<float>();
      kernels::quantize_rows(args, begin, end);
      return;
    }
    const auto* halves = static_cast<const uint16_t*>(x.const_data_ptr());
    std::vector<float> row(static_cast<size_t>(width_));
    args.x = row.data();
    for (; begin < end; ++begin) {
      kernels::to_float({.bfloat16 = x.scalar_type() == at::kBFloat16,
                         .half_in = halves + begin * width_,
                         .float_out = row.data()},
                        0, width_);
      args.codes = codes_.get() + begin * stride_;
      args.scale = scale_.data() + begin;
      args.zero_point = zero_point_.data() + begin;
      kernels::quantize_rows(args, 0, 1);
    }
  }

  int64_t width_, stride_;
  AlignedBuffer<uint8_t> codes_;
  std::vector<float> scale_;
  std::vector<int32_t> zero_point_;
};

// From the sums of blocks of the product to results.
class Results {
 public:
  Results(const Rows& rows, const ChannelTerms& terms, const float* bias, Activation activation,
          const Tensor& y)
      : rows_(rows),
        terms_(terms),
        bias_(bias),
        activation_(activation),
        y_(y),
        float32_(y.scalar_type() == at::kFloat) {}

  // Bytes that `write` needs for results that are not float32.
  int64_t values_bytes(const CodeProduct::Block& largest) const {
    return float32_ ? 0 : largest.sums() * static_cast<int64_t>(sizeof(float));
  }

  void write(const CodeProduct::Block& block, const int32_t* sums, float* values) const {
    const int64_t channels = y_.size(-1);
    const int64_t to = block.row * channels + block.column;
    kernels::scale_sums({.sums = sums,
                         .sums_row_stride = block.columns,
                         .columns = block.columns,
                         .row_factor = rows_.zero_point(block.row),
                         .row_scale = rows_.scale(block.row),
                         .column_term = terms_.offset.data() + block.column,
                         .column_scale = terms_.multiplier.data() + block.column,
                         .bias = bias_ == nullptr ? nullptr : bias_ + block.column,
                         .activation = activation_,
                         .y_row_stride = float32_ ? channels : block.columns,
                         .y = float32_ ? y_.mutable_data_ptr<float>() + to : values},
                        0, block.rows);
    if (float32_) return;
    auto* const halves = static_cast<uint16_t*>(y_.mutable_data_ptr()) + to;
    for (int64_t r = 0; r < block.rows; ++r) {
      kernels::from_float({.bfloat16 = y_.scalar_type() == at::kBFloat16,
                           .float_in = values + r * block.columns,
                           .half_out = halves + r * channels},
                          0, block.columns);
    }
  }

 private:
  const Rows& rows_;
  const ChannelTerms& terms_;
  const float* bias_;
  Activation activation_;
  const Tensor& y_;
  bool float32_;
};

Tensor linear_dynamic_cpu(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const OptionalTensor& bias, std::string_view activation) {
  const Tensor y = linear_dynamic_meta(x, weight, weight_scale, bias, activation);
  const int64_t width = x.size(-1);
  const int64_t count = x.numel() / width;
  const kernels::Conv2dShape shape{
      .out_height = 1, .out_width = count, .in_channels = width, .out_channels = weight.size(0)};
  check_accumulator(kOp, shape);
  const Tensor scale = weight_scale.contiguous();
  // With a zero point of 1 the terms are the scales and the negated sums of the weights.
  const PackedHandle packed = packed_weight({.op = kOp,
                                             .weight = weight,
                                             .weight_scale = scale,
                                             .bias = nullptr,
                                             .shape = shape,
                                             .x_zero_point = 1});
  if (count == 0) return y;
  const Tensor dense_bias = bias ? bias->contiguous() : Tensor();
  const Tensor& canonical = packed.weight->canonical;
  const Rows rows(x.contiguous(), count, width);
  const CodeProduct product(
      {.codes = rows.codes(),
       .row_stride = rows.stride(),
       .rows = count,
       .width = width,
       .packed = packed.weight->bytes.get(),
       .layout = packed.weight->layout,
       .weight = (canonical.defined() ? canonical : weight).const_data_ptr<int8_t>(),
       .columns = weight.size(0)});
  const Results results(rows, *packed.terms, bias ? dense_bias.const_data_ptr<float>() : nullptr,
                        activation_of(activation), y);
  at::parallel_for(0, product.blocks(), grain_of(kMultiplyGrain, product.multiplications()),
                   [&](int64_t begin, int64_t end) {
                     const CodeProduct::Block largest = product.largest();
                     const auto sums = aligned_buffer<std::byte>(largest.sums() * sizeof(int32_t));
                     const auto values = aligned_buffer<std::byte>(results.values_bytes(largest));
                     for (; begin < end; ++begin) {
                       const CodeProduct::Block block = product.block(begin);
                       product.multiply(block, reinterpret_cast<int32_t*>(sums.get()));
                       results.write(block, reinterpret_cast<int32_t*>(sums.get()),
                                     reinterpret_cast<float*>(values.get()));
                     }
                   });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "linear_dynamic(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, "
      "str activation) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("linear_dynamic", linear_dynamic_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("linear_dynamic", linear_dynamic_cpu); }

}  // namespace qtoolkit::ops
