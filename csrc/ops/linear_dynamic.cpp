// The fully connected layer on float rows that are quantized here, each by its own range.
//
// The rows' codes are multiplied with the packed weight in blocks of rows and channels whose int32
// sums stay in the first or second level cache until they become results.
#include <torch/library.h>

#include <array>
#include <cstddef>
#include <string_view>

#include "kernels/kernels.h"
#include "ops/aligned_buffer.h"
#include "ops/checks.h"
#include "ops/conv_args.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/weight_cache.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "linear_dynamic";

// Rows whose codes are multiplied with a part of the weight before the next rows come: as many as
// fill this much of a second level cache.
constexpr int64_t kBlockBytes = int64_t{1} << 20;
// Sums of a block of rows and channels; those of one block of kChannelBlock channels at least.
constexpr int64_t kMostSums = 4096;
constexpr int64_t kMostChannels = 4 * kernels::kChannelBlock;

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
      : rows_(rows),
        width_(width),
        // An odd number of cache lines: rows at a power of two share the sets of a cache.
        stride_((width + 63) / 64 * 64 | 64),
        codes_(aligned_buffer<uint8_t>(rows * stride_ + kernels::kOverread)),
        scale_(static_cast<size_t>(rows)),
        zero_point_(static_cast<size_t>(rows)) {
    at::parallel_for(0, rows, grain_of(kElementGrain, width),
                     [&](int64_t begin, int64_t end) { quantize(x, begin, end); });
  }

  int64_t count() const { return rows_; }
  int64_t stride() const { return stride_; }
  const uint8_t* codes(int64_t row) const { return codes_.get() + row * stride_; }
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

  int64_t rows_, width_, stride_;
  AlignedBuffer<uint8_t> codes_;
  std::vector<float> scale_;
  std::vector<int32_t> zero_point_;
};

// Results of rows and channels of the product.
class Product {
 public:
  Product(const Rows& rows, const kernels::Conv2dShape& shape, const PackedHandle& packed,
          const Tensor& weight, const float* bias, Activation activation, const Tensor& y)
      : rows_(rows),
        shape_(shape),
        packed_(packed),
        weight_(weight.const_data_ptr<int8_t>()),
        bias_(bias),
        activation_(activation),
        y_(y) {}

  // Rows [row, row + rows) at channels [channel, channel + channels), the first a block's first.
  // `sums` holds rows * channels elements, `values` too unless y is float32.
  void compute(int64_t row, int64_t rows, int64_t channel, int64_t channels, int32_t* sums,
               float* values) const {
    multiply(row, rows, channel, channels, sums);
    const bool direct = y_.scalar_type() == at::kFloat;
    const int64_t to = row * shape_.out_channels + channel;
    kernels::scale_sums({.sums = sums,
                         .sums_row_stride = channels,
                         .columns = channels,
                         .row_factor = rows_.zero_point(row),
                         .row_scale = rows_.scale(row),
                         .column_term = packed_.terms->offset.data() + channel,
                         .column_scale = packed_.terms->multiplier.data() + channel,
                         .bias = bias_ == nullptr ? nullptr : bias_ + channel,
                         .activation = activation_,
                         .y_row_stride = direct ? shape_.out_channels : channels,
                         .y = direct ? y_.mutable_data_ptr<float>() + to : values},
                        0, rows);
    if (direct) return;
    auto* const halves = static_cast<uint16_t*>(y_.mutable_data_ptr()) + to;
    for (int64_t r = 0; r < rows; ++r) {
      kernels::from_float({.bfloat16 = y_.scalar_type() == at::kBFloat16,
                           .float_in = values + r * channels,
                           .half_out = halves + r * shape_.out_channels},
                          0, channels);
    }
  }

 private:
  void multiply(int64_t row, int64_t rows, int64_t channel, int64_t channels, int32_t* sums) const {
    static constexpr std::array<int32_t, kMostChannels> kNothing{};
    kernels::Conv2dArgs args;
    args.shape = shape_;
    args.shape.out_width = rows;
    args.shape.out_channels = channels;
    args.x = rows_.codes(row);
    args.x_pixel_stride = rows_.stride();
    args.x_row_stride = rows * rows_.stride();
    args.weight = weight_ + channel * shape_.in_channels;
    args.layout = packed_.weight->layout;
    args.packed = kernels::conv2d_packed_block(args.layout, shape_, packed_.weight->bytes.get(),
                                               channel / kernels::kChannelBlock);
    args.offset = kNothing.data();
    args.multiplier = packed_.terms->multiplier.data() + channel;
    args.output = kernels::Conv2dOutput::int32;
    args.y = sums;
    args.y_pixel_stride = channels;
    args.y_row_stride = rows * channels;
    kernels::conv2d(args, 0, kernels::conv2d_units(args.shape));
  }

  const Rows& rows_;
  const kernels::Conv2dShape& shape_;
  const PackedHandle& packed_;
  const int8_t* weight_;
  const float* bias_;
  Activation activation_;
  const Tensor& y_;
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
  const Product product(rows, shape, packed, canonical.defined() ? canonical : weight,
                        bias ? dense_bias.const_data_ptr<float>() : nullptr,
                        activation_of(activation), y);

  const int64_t block =
      std::min(count, std::max(kBlockBytes / rows.stride(), kernels::kTilePixels));
  const int64_t channels =
      std::clamp(kMostSums / block / kernels::kChannelBlock * kernels::kChannelBlock,
                 kernels::kChannelBlock, kMostChannels);
  const int64_t parts = (shape.out_channels + channels - 1) / channels;
  const int64_t blocks = (count + block - 1) / block;
  // Parts of the weight are numbered within a block of rows: with few rows every thread reads a
  // piece of the weight of its own, with many it has rows of its own.
  at::parallel_for(0, blocks * parts, grain_of(kMultiplyGrain, block * channels * width),
                   [&](int64_t begin, int64_t end) {
                     const auto sums = aligned_buffer<std::byte>(block * channels * 4);
                     const auto values = aligned_buffer<std::byte>(
                         y.scalar_type() == at::kFloat ? 0 : block * channels * 4);
                     for (int64_t unit = begin; unit < end; ++unit) {
                       const int64_t row = unit / parts * block;
                       const int64_t channel = unit % parts * channels;
                       product.compute(row, std::min(block, count - row), channel,
                                       std::min(channels, shape.out_channels - channel),
                                       reinterpret_cast<int32_t*>(sums.get()),
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
