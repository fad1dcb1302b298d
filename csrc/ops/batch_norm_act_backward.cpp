// The gradient of the fused training batch norm (Ioffe & Szegedy 2015, section 3).
#include <torch/library.h>

#include "ops/batch_norm_act.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "batch_norm_act_backward";

void check_args(const Tensor& grad, const Tensor& x, const OptionalTensor& weight,
                const Tensor& mean, const Tensor& invstd, const Tensor& mask) {
  check_batch_norm_input(kOp, x);
  check_float(kOp, "grad", grad);
  check_device(kOp, "grad", grad, x);
  TORCH_CHECK_VALUE(grad.sym_sizes() == x.sym_sizes(), "qtoolkit::", kOp,
                    ": grad must have the shape of x, got ", describe(grad), " and ", describe(x));
  check_batch_norm_channels(kOp, "weight", weight, x);
  check_batch_norm_channels(kOp, "mean", mean, x);
  check_batch_norm_channels(kOp, "invstd", invstd, x);
  check_dtype(kOp, "mask", mask, at::kByte);
  check_device(kOp, "mask", mask, x);
  TORCH_CHECK_VALUE(mask.dim() == 1 && (mask.sym_size(0) == mask_size(x) || mask.sym_size(0) == 0),
                    "qtoolkit::", kOp, ": mask must hold ", mask_size(x),
                    " bytes, or none where every gradient passes, got ", describe(mask));
}

// What is not asked for is an empty tensor.
BatchNormGradients empty_gradients(const Tensor& grad, const Tensor& x,
                                   std::array<bool, 4> output_mask) {
  const auto contiguous = at::MemoryFormat::Contiguous;
  const auto none = [&](at::ScalarType dtype) { return empty_beside(x, {0}, dtype, contiguous); };
  const auto like_x = [&](bool wanted, at::ScalarType dtype) {
    return wanted ? empty_beside(x, x.sym_sizes(), dtype, x.suggest_memory_format()) : none(dtype);
  };
  const auto per_channel = [&](bool wanted) {
    return wanted ? empty_beside(x, {x.sym_size(1)}, at::kFloat, contiguous) : none(at::kFloat);
  };
  return {like_x(output_mask[0], x.scalar_type()), per_channel(output_mask[1]),
          per_channel(output_mask[2]), like_x(output_mask[3], grad.scalar_type())};
}

BatchNormGradients batch_norm_act_backward_meta(const Tensor& grad, const Tensor& x,
                                                const OptionalTensor& weight, const Tensor& mean,
                                                const Tensor& invstd, const Tensor& mask,
                                                bool /*training*/,
                                                std::array<bool, 4> output_mask) {
  check_args(grad, x, weight, mean, invstd, mask);
  return empty_gradients(grad, x, output_mask);
}

BatchNormGradients batch_norm_act_backward_cpu(const Tensor& grad, const Tensor& x,
                                               const OptionalTensor& weight, const Tensor& mean,
                                               const Tensor& invstd, const Tensor& mask,
                                               bool training, std::array<bool, 4> output_mask) {
  return batch_norm_act_backward(grad, x, weight, mean, invstd, mask, training, output_mask, false);
}

// Per channel: the sum of dz, and that of dz * x.
struct GradientSums {
  std::vector<double> dz, products;
};

GradientSums gradient_sums(const ChannelView& view, const float* grad, const float* x,
                           const uint8_t* mask, float* dz) {
  const auto channels = static_cast<size_t>(view.channels);
  GradientSums result{std::vector<double>(channels), std::vector<double>(channels)};
  if (view.outer * view.channels * view.inner == 0) return result;
  for (const SumPiece& piece : sum_pieces(view)) {
    const auto size = static_cast<size_t>(piece.results());
    std::vector<double> sum(size), products(size);
    // Pieces begin at whole bytes of the mask.
    const kernels::BatchNormReduceArgs args{
        .outer = piece.view.outer,
        .channels = piece.view.channels,
        .inner = piece.view.inner,
        .part_rows = piece.part_rows,
        .grad = grad + piece.first_element,
        .x = x + piece.first_element,
        .mask = mask == nullptr ? nullptr : mask + piece.first_element / 8,
        .dz = dz == nullptr ? nullptr : dz + piece.first_element,
        .sum = sum.data(),
        .products = products.data()};
    at::parallel_for(
        0, piece.parts, grain_of(kElementGrain, piece.elements_of_part()),
        [&](int64_t begin, int64_t end) { kernels::batch_norm_reduce(args, begin, end); });
    for (size_t r = 0; r < size; ++r) {
      result.dz[r % channels] += sum[r];
      result.products[r % channels] += products[r];
    }
  }
  return result;
}

}  // namespace

BatchNormGradients batch_norm_act_backward(const Tensor& grad, const Tensor& x,
                                           const OptionalTensor& weight, const Tensor& mean,
                                           const Tensor& invstd, const Tensor& mask, bool training,
                                           std::array<bool, 4> output_mask, bool overwrite_grad) {
  check_args(grad, x, weight, mean, invstd, mask);
  const auto [want_x, want_weight, want_bias, want_residual] = output_mask;
  const ChannelView view = batch_norm_view(x);
  const auto channels = static_cast<size_t>(view.channels);
  const at::MemoryFormat format = x.suggest_memory_format();
  const Tensor dense_x = x.to(at::kFloat).contiguous(format);
  const Tensor dense_mask = mask.contiguous();
  Tensor dz = grad.to(at::kFloat).contiguous(format);  // masked below
  const bool own = overwrite_grad || !dz.is_same(grad);
  const auto new_floats = [&] { return empty_beside(x, x.sym_sizes(), at::kFloat, format); };
  const uint8_t* bits = mask.numel() == 0 ? nullptr : dense_mask.const_data_ptr<uint8_t>();

  GradientSums sums;
  if (want_weight || want_bias || want_residual || (training && want_x)) {
    const Tensor source = dz;
    if (want_residual && !own) dz = new_floats();
    sums = gradient_sums(view, source.const_data_ptr<float>(), dense_x.const_data_ptr<float>(),
                         bits, want_residual ? dz.mutable_data_ptr<float>() : nullptr);
    if (want_residual) bits = nullptr;
  }

  const std::vector<double> means = channel_values(mean, view.channels, 0.0);
  const std::vector<double> invstds = channel_values(invstd, view.channels, 1.0);
  const std::vector<double> weights = channel_values(weight, view.channels, 1.0);
  std::array<bool, 4> small = output_mask;
  small[0] = small[3] = false;
  BatchNormGradients result = empty_gradients(grad, x, small);
  auto& [grad_x, grad_weight, grad_bias, grad_residual] = result;
  std::vector<float> factor(channels), center(channels), slope(channels), addend(channels);
  const auto count = static_cast<double>(view.outer * view.inner);
  for (size_t c = 0; c < channels; ++c) {
    const double scaled = weights[c] * invstds[c];
    factor[c] = static_cast<float>(scaled);
    if (sums.dz.empty()) continue;
    const double normalized = (sums.products[c] - means[c] * sums.dz[c]) * invstds[c];
    if (want_weight) grad_weight.mutable_data_ptr<float>()[c] = static_cast<float>(normalized);
    if (want_bias) grad_bias.mutable_data_ptr<float>()[c] = static_cast<float>(sums.dz[c]);
    center[c] = static_cast<float>(means[c]);
    slope[c] = static_cast<float>(-scaled * invstds[c] * normalized / count);
    addend[c] = static_cast<float>(-scaled * sums.dz[c] / count);
  }

  if (want_residual) grad_residual = dz.to(grad.scalar_type());
  if (!want_x) return result;
  const Tensor floats = own && !want_residual ? dz : new_floats();
  const ChannelNumbers numbers(view);
  const std::vector<float> factors = numbers.spread(factor), centers = numbers.spread(center);
  const std::vector<float> slopes = numbers.spread(slope), addends = numbers.spread(addend);
  const kernels::BatchNormGradientArgs args{
      .outer = view.outer,
      .channels = view.channels,
      .inner = view.inner,
      .period = numbers.period(),
      .factor = factors.data(),
      .mean = centers.data(),
      .slope = slopes.data(),
      .addend = addends.data(),
      .grad = dz.const_data_ptr<float>(),
      .x = training ? dense_x.const_data_ptr<float>() : nullptr,
      .mask = bits,
      .grad_x = floats.mutable_data_ptr<float>()};
  for_element_blocks(x.numel(), Order::forwards, [&](int64_t begin, int64_t end) {
    kernels::batch_norm_gradient(args, begin, end);
  });
  grad_x = floats.to(x.scalar_type());
  return result;
}

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, "
      "Tensor mask, bool training, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("batch_norm_act_backward", batch_norm_act_backward_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("batch_norm_act_backward", batch_norm_act_backward_cpu);
}

}  // namespace qtoolkit::ops
