// The fully connected layer with a weight of few bits and activations that are quantized here, each
// group of each row by its own range.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/path.h"
#include "ops/aligned_buffer.h"
#include "ops/checks.h"
#include "ops/huge_pages.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/weight_only_checks.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "linear_weight_only";

struct Arguments {
  const Tensor& x;
  const Tensor& codes;
  const Tensor& scale;
  const OptionalTensor& zero_point;
  const OptionalTensor& bias;
  int64_t bits, group_size;
  const OptionalTensor& table;
};

// The bits of a code as the kernel reads it: those of other widths are unpacked to bytes first.
int64_t kernel_bits(int64_t bits) { return bits == 1 || bits == 2 || bits == 4 ? bits : 8; }

Tensor check(const Arguments& args) {
  TORCH_CHECK_VALUE(args.group_size * kernel_bits(args.bits) % 32 == 0,
                    "qtoolkit::linear_weight_only: group_size must be a multiple of ",
                    32 / kernel_bits(args.bits), " for codes of ", args.bits, " bits, got ",
                    args.group_size);
  const Tensor y = check_weight_only(
      kOp, args.x, {args.codes, args.scale, args.zero_point, args.bits, args.group_size},
      args.bias);
  if (args.table) {
    check_dtype(kOp, "table", *args.table, at::kChar);
    check_device(kOp, "table", *args.table, args.x);
    TORCH_CHECK_VALUE(!args.zero_point && kernel_bits(args.bits) != 8 && args.table->dim() == 1 &&
                          args.table->sym_size(0) == int64_t{1} << args.bits,
                      "qtoolkit::linear_weight_only: a table needs codes of 1, 2 or 4 bits, no "
                      "zero_point, and 2**bits elements, got ",
                      describe(*args.table));
  }
  return y;
}

Tensor linear_weight_only_meta(const Tensor& x, const Tensor& codes, const Tensor& scale,
                               const OptionalTensor& zero_point, const OptionalTensor& bias,
                               int64_t bits, int64_t group_size, const OptionalTensor& table) {
  const Arguments args{x, codes, scale, zero_point, bias, bits, group_size, table};
  const Tensor y = check(args);
  return x.scalar_type() == at::kFloat
             ? y
             : empty_beside(x, y.sym_sizes(), x.scalar_type(), at::MemoryFormat::Contiguous);
}

// Rows of activations in the kernel's layout.
struct Activations {
  AlignedBuffer<int8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> sums;
  int64_t lanes = 1;
};

// Rows of codes of 3, 5, 6 or 7 bits as bytes. Eight codes are `bits` bytes, which are spread over
// a word in three steps: halves, quarters, eighths.
void unpack_bytes(const uint8_t* codes, int64_t bytes, int64_t bits, int64_t width, uint8_t* to) {
  // The lower half of the codes of each field of `step` bits.
  const auto mask = [&](int64_t count, int64_t step) {
    uint64_t result = 0;
    for (int64_t at = 0; at < 64; at += step) {
      result |= ((uint64_t{1} << (count * bits)) - 1) << at;
    }
    return result;
  };
  const auto spread = [](uint64_t word, uint64_t lower, int64_t distance) {
    return (word & lower) | (word & ~lower) << distance;
  };
  const uint64_t four = mask(4, 64), two = mask(2, 32), one = mask(1, 16);
  for (int64_t k = 0; k < width; k += 8, codes += bits, bytes -= bits, to += 8) {
    uint64_t word = 0;
    std::memcpy(&word, codes, static_cast<size_t>(std::min(bits, bytes)));
    word = spread(word, four, 32 - 4 * bits);
    word = spread(word, two, 16 - 2 * bits);
    word = spread(word, one, 8 - bits);
    std::memcpy(to, &word, static_cast<size_t>(std::min<int64_t>(8, width - k)));
  }
}

// Multiplies blocks of channels of such a weight, each unpacked before.
void multiply_unpacked(const kernels::MultiplyGroupsArgs& all, int64_t begin, int64_t end) {
  const kernels::GroupedWeight& weight = all.weight;
  const auto numbers = aligned_buffer<uint8_t>(kernels::kGroupedChannels * weight.width);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kernels::kGroupedChannels;
    const int64_t count = std::min(kernels::kGroupedChannels, weight.channels - first);
    for (int64_t i = 0; i < count; ++i) {
      unpack_bytes(weight.codes + (first + i) * weight.row_stride, weight.row_stride, weight.bits,
                   weight.width, numbers.get() + i * weight.width);
    }
    kernels::MultiplyGroupsArgs args = all;
    args.weight.bits = 8;
    args.weight.channels = count;
    args.weight.codes = numbers.get();
    args.weight.row_stride = weight.width;
    args.weight.scale += first * weight.groups();
    if (args.weight.zero_point != nullptr) args.weight.zero_point += first * weight.groups();
    if (args.bias != nullptr) args.bias += first;
    args.y += first;
    kernels::multiply_groups(args, 0, 1);
  }
}

// Up to so many rows are multiplied one by one, each with the weights as they lie: tiles are worth
// it sooner than vectors of 16 rows.
int64_t few_rows() {
  return kernels::selected_path(kernels::Kernel::multiply_groups) == kernels::Path::amx ? 3 : 4;
}

Activations quantize(const Tensor& x, int64_t rows, const kernels::GroupedWeight& weight) {
  Activations result;
  result.lanes = rows <= few_rows() ? 1 : 16;
  const int64_t blocks = (rows + result.lanes - 1) / result.lanes;
  const int64_t padded = blocks * result.lanes;
  result.codes = aligned_buffer<int8_t>(padded * kernels::grouped_quads(weight) * 4 +
                                        kernels::kGroupedOverread);
  result.scale.resize(static_cast<size_t>(padded * weight.groups()));
  result.sums.resize(static_cast<size_t>(padded * weight.groups()));
  const kernels::QuantizeGroupsArgs args{.weight = weight,
                                         .x = x.const_data_ptr<float>(),
                                         .rows = rows,
                                         .x_row_stride = weight.width,
                                         .lanes = result.lanes,
                                         .codes = result.codes.get(),
                                         .scale = result.scale.data(),
                                         .sums = result.sums.data()};
  at::parallel_for(0, blocks, grain_of(kElementGrain, weight.width * result.lanes),
                   [&](int64_t begin, int64_t end) { kernels::quantize_groups(args, begin, end); });
  return result;
}

Tensor linear_weight_only_cpu(const Tensor& x, const Tensor& codes, const Tensor& scale,
                              const OptionalTensor& zero_point, const OptionalTensor& bias,
                              int64_t bits, int64_t group_size, const OptionalTensor& table) {
  const Tensor y = check({x, codes, scale, zero_point, bias, bits, group_size, table});
  const int64_t width = x.size(-1), rows = x.numel() / width;
  constexpr int64_t kMostSteps = int64_t{255} * 127;
  TORCH_CHECK_VALUE(std::min(group_size, width) <= INT32_MAX / kMostSteps,
                    "qtoolkit::linear_weight_only: a group of ", group_size,
                    " could leave the int32 accumulator; the most is ", INT32_MAX / kMostSteps);
  if (rows == 0 || codes.size(0) == 0) return y.to(x.scalar_type());
  const Tensor dense = codes.contiguous(), scales = scale.contiguous();
  if (dense.is_same(codes)) move_to_huge_pages(codes.const_data_ptr(), codes.nbytes());
  const Tensor zeros = zero_point ? zero_point->contiguous() : Tensor();
  const Tensor biases = bias ? bias->contiguous() : Tensor();
  std::array<uint8_t, 16> numbers{};
  if (table) {
    const Tensor entries = table->contiguous();
    for (size_t i = 0; i < numbers.size(); ++i) {
      const auto code = static_cast<int64_t>(i) & ((int64_t{1} << bits) - 1);
      numbers[i] = static_cast<uint8_t>(entries.const_data_ptr<int8_t>()[code] + 128);
    }
  }
  const kernels::GroupedWeight weight{
      .bits = bits,
      .channels = codes.size(0),
      .width = width,
      .group = group_size,
      .codes = dense.const_data_ptr<uint8_t>(),
      .row_stride = dense.size(1),
      .scale = scales.const_data_ptr<float>(),
      .zero_point = zero_point ? zeros.const_data_ptr<uint8_t>() : nullptr,
      .zero = table ? 128 : 1 << (bits - 1),
      .table = table ? numbers.data() : nullptr};
  kernels::GroupedWeight as_multiplied = weight;
  as_multiplied.bits = kernel_bits(bits);
  const Activations activations = quantize(x.to(at::kFloat).contiguous(), rows, as_multiplied);
  const kernels::MultiplyGroupsArgs args{.weight = weight,
                                         .rows = rows,
                                         .lanes = activations.lanes,
                                         .x = activations.codes.get(),
                                         .x_scale = activations.scale.data(),
                                         .x_sums = activations.sums.data(),
                                         .bias = bias ? biases.const_data_ptr<float>() : nullptr,
                                         .y = y.mutable_data_ptr<float>(),
                                         .y_row_stride = weight.channels};
  const int64_t blocks =
      (weight.channels + kernels::kGroupedChannels - 1) / kernels::kGroupedChannels;
  at::parallel_for(0, blocks, grain_of(kMultiplyGrain, rows * width * kernels::kGroupedChannels),
                   [&](int64_t begin, int64_t end) {
                     if (kernel_bits(bits) == bits) {
                       kernels::multiply_groups(args, begin, end);
                     } else {
                       multiply_unpacked(args, begin, end);
                     }
                   });
  return y.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "linear_weight_only(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, Tensor? bias, "
      "int bits, int group_size, Tensor? table) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("linear_weight_only", linear_weight_only_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("linear_weight_only", linear_weight_only_cpu); }

}  // namespace qtoolkit::ops
