// The fully connected layer with a weight of few bits and activations as they are: sums in float32.
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "kernels/kernels.h"
#include "ops/aligned_buffer.h"
#include "ops/checks.h"
#include "ops/huge_pages.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/weight_only_checks.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "linear_weight_only_exact";

Tensor check(const Tensor& x, const CodedWeight& weight, const OptionalTensor& bias,
             const OptionalTensor& table) {
  const Tensor y = check_weight_only(kOp, x, weight, bias);
  if (table) {
    check_dtype(kOp, "table", *table, at::kFloat);
    check_device(kOp, "table", *table, x);
    TORCH_CHECK_VALUE(
        !weight.zero_point && table->dim() == 1 && table->sym_size(0) == int64_t{1} << weight.bits,
        "qtoolkit::linear_weight_only_exact: a table needs 2**bits elements and no "
        "zero_point, got ",
        describe(*table));
  }
  return y;
}

Tensor linear_weight_only_exact_meta(const Tensor& x, const Tensor& codes, const Tensor& scale,
                                     const OptionalTensor& zero_point, const OptionalTensor& bias,
                                     int64_t bits, int64_t group_size,
                                     const OptionalTensor& table) {
  const Tensor y = check(x, {codes, scale, zero_point, bits, group_size}, bias, table);
  return x.scalar_type() == at::kFloat
             ? y
             : empty_beside(x, y.sym_sizes(), x.scalar_type(), at::MemoryFormat::Contiguous);
}

// Rows as the kernel reads them.
AlignedBuffer<std::byte> arranged(const Tensor& x, int64_t rows, int64_t width, int64_t blocks) {
  constexpr int64_t kBlock = kernels::kFloatBlock;
  const int64_t stride = blocks * kBlock;
  auto result = aligned_buffer<std::byte>(rows * stride * static_cast<int64_t>(sizeof(float)));
  auto* const floats = reinterpret_cast<float*>(result.get());
  const float* const from = x.const_data_ptr<float>();
  at::parallel_for(0, rows, grain_of(kElementGrain, width), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const float* const row = from + m * width;
      float* const to = floats + m * stride;
      const int64_t whole = width / kBlock * kBlock;
      for (int64_t block = 0; block < whole; block += kBlock) {
        for (int64_t i = 0; i < kernels::kFloatRun; ++i) {
          for (int64_t lane = 0; lane < kernels::kFloatLanes; ++lane) {
            to[block + i * kernels::kFloatLanes + lane] =
                row[block + lane * kernels::kFloatRun + i];
          }
        }
      }
      std::fill(to + whole, to + stride, 0.0f);
      for (int64_t k = whole; k < width; ++k) to[kernels::float_position(k)] = row[k];
    }
  });
  return result;
}

Tensor linear_weight_only_exact_cpu(const Tensor& x, const Tensor& codes, const Tensor& scale,
                                    const OptionalTensor& zero_point, const OptionalTensor& bias,
                                    int64_t bits, int64_t group_size, const OptionalTensor& table) {
  const Tensor y = check(x, {codes, scale, zero_point, bits, group_size}, bias, table);
  const int64_t width = x.size(-1), rows = x.numel() / width;
  if (rows == 0 || codes.size(0) == 0) return y.to(x.scalar_type());
  const Tensor dense = codes.contiguous(), scales = scale.contiguous();
  if (dense.is_same(codes)) move_to_huge_pages(codes.const_data_ptr(), codes.nbytes());
  const Tensor zeros = zero_point ? zero_point->contiguous() : Tensor();
  const Tensor biases = bias ? bias->contiguous() : Tensor();
  const Tensor numbers = table ? table->contiguous() : Tensor();
  const kernels::FloatWeight weight{
      .bits = bits,
      .channels = codes.size(0),
      .width = width,
      .group = group_size,
      .codes = dense.const_data_ptr<uint8_t>(),
      .row_stride = dense.size(1),
      .scale = scales.const_data_ptr<float>(),
      .zero_point = zero_point ? zeros.const_data_ptr<uint8_t>() : nullptr,
      .zero = table ? 0.0f : static_cast<float>(1 << (bits - 1)),
      .numbers = table ? numbers.const_data_ptr<float>() : nullptr};
  const auto activations = arranged(x.to(at::kFloat).contiguous(), rows, width, weight.blocks());
  const kernels::MultiplyFloatsArgs args{.weight = weight,
                                         .rows = rows,
                                         .x = reinterpret_cast<const float*>(activations.get()),
                                         .bias = bias ? biases.const_data_ptr<float>() : nullptr,
                                         .y = y.mutable_data_ptr<float>(),
                                         .y_row_stride = weight.channels};
  const int64_t blocks = (weight.channels + kernels::kFloatChannels - 1) / kernels::kFloatChannels;
  at::parallel_for(0, blocks, grain_of(kMultiplyGrain, rows * width * kernels::kFloatChannels),
                   [&](int64_t begin, int64_t end) { kernels::multiply_floats(args, begin, end); });
  return y.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "linear_weight_only_exact(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, "
      "Tensor? bias, int bits, int group_size, Tensor? table) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("linear_weight_only_exact", linear_weight_only_exact_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("linear_weight_only_exact", linear_weight_only_exact_cpu);
}

}  // namespace qtoolkit::ops
