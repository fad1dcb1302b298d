// What operators on two tensors of codes share: arguments, checks, broadcasting.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "kernels/elementwise.h"
#include "ops/checks.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {

struct BinaryArguments {
  const Tensor &a, &a_scale, &a_zero_point;
  const Tensor &b, &b_scale, &b_zero_point;
  const Tensor &y_scale, &y_zero_point;
  int64_t quant_min, quant_max;
  bool relu;
};

// Checks what Meta tensors show; the empty output of the broadcast shape, in the layout of an
// operand that has it already.
Tensor binary_meta(const char* op, const BinaryArguments& given);

// Operands broadcast to the output's shape: `outer` groups of `rows` rows of `channels` codes, with
// the kernels' strides inside a group.
struct BroadcastRows {
  Tensor a, b;           // they keep the memory alive
  bool swapped = false;  // a and b have changed places
  bool b_single = false;
  int64_t channels = 1, a_row_stride = 0, b_row_stride = 0, y_row_stride = 0;
  int64_t rows = 1, outer = 1;
  // Of each group, the first code's place.
  std::vector<int64_t> a_offsets, b_offsets, y_offsets;
};
BroadcastRows broadcast_rows(const Tensor& a, const Tensor& b, const Tensor& y);

// The values of the quantization parameters, a and b in the caller's order.
struct BinaryQParams {
  CodeRange a_range, b_range, range;
  QParams a, b, y;
};
BinaryQParams read_binary_qparams(const char* op, const BinaryArguments& given);

// Calls kernel(args, begin, end) over all of y. set_multipliers(args, swapped) fills in what only
// the operator knows.
template <class Args, class SetMultipliers>
void run_binary(const BinaryArguments& given, const BinaryQParams& qparams, const Tensor& y,
                void (*kernel)(const Args&, int64_t, int64_t), SetMultipliers set_multipliers) {
  if (y.numel() == 0) return;
  const BroadcastRows part = broadcast_rows(given.a, given.b, y);
  const bool swapped = part.swapped;
  Args args;
  args.a_row_stride = part.a_row_stride;
  args.b_row_stride = part.b_row_stride;
  args.y_row_stride = part.y_row_stride;
  args.b_single = part.b_single;
  args.a_signed = (swapped ? qparams.b_range : qparams.a_range).is_signed();
  args.b_signed = (swapped ? qparams.a_range : qparams.b_range).is_signed();
  args.a_zero_point = (swapped ? qparams.b : qparams.a).zero_point;
  args.b_zero_point = (swapped ? qparams.a : qparams.b).zero_point;
  args.zero_point = qparams.y.zero_point;
  args.lo = relu_bound(qparams.range, qparams.y.zero_point, given.relu);
  args.hi = qparams.range.max;
  set_multipliers(args, swapped);
  const auto* a = static_cast<const uint8_t*>(part.a.const_data_ptr());
  const auto* b = static_cast<const uint8_t*>(part.b.const_data_ptr());
  auto* to = static_cast<uint8_t*>(y.mutable_data_ptr());
  if (part.rows == 1 && part.outer == 1) {  // one row, which may be cut anywhere
    at::parallel_for(0, part.channels, kElementGrain, [&](int64_t begin, int64_t end) {
      Args stretch = args;
      stretch.a = a + begin;
      stretch.b = part.b_single ? b : b + begin;
      stretch.y = to + begin;
      stretch.channels = end - begin;
      kernel(stretch, 0, 1);
    });
    return;
  }
  args.channels = part.channels;
  at::parallel_for(0, part.outer * part.rows, grain_of(kElementGrain, part.channels),
                   [&](int64_t begin, int64_t end) {
                     Args group = args;
                     for (int64_t at = begin; at < end;) {
                       const int64_t outer = at / part.rows, first = at % part.rows;
                       const int64_t last = std::min(part.rows, first + end - at);
                       group.a = a + part.a_offsets[outer];
                       group.b = b + part.b_offsets[outer];
                       group.y = to + part.y_offsets[outer];
                       kernel(group, first, last);
                       at += last - first;
                     }
                   });
}

}  // namespace qtoolkit::ops
