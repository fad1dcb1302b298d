// Channel and pixel shuffle of 8-bit codes. The output is channels_last.
#include <torch/library.h>

#include "kernels/move.h"
#include "kernels/shuffle_plan.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

constexpr auto kFormat = at::MemoryFormat::ChannelsLast;

void check_number(const char* op, const char* argument, int64_t number) {
  TORCH_CHECK_VALUE(number >= 1 && number <= (1 << 15), "qtoolkit::", op, ": ", argument,
                    " must lie in [1, 32768], got ", number);
}

// Moves the codes of x into y, both of blocks that follow each other without gaps; `args` has their
// strides in the image.
void shuffle_into(const Tensor& y, const Tensor& x, kernels::ShuffleCodesArgs args,
                  const kernels::CodeShuffle& plan) {
  const Tensor dense = x.contiguous(kFormat);
  args.x = static_cast<const uint8_t*>(dense.const_data_ptr());
  args.y = static_cast<uint8_t*>(y.mutable_data_ptr());
  args.x_image_stride = args.rows * args.x_row_stride;
  args.y_image_stride = args.rows * args.y_row_stride;
  args.pieces = plan.pieces.data();
  args.piece_count = std::ssize(plan.pieces);
  args.windows = plan.windows.data();
  at::parallel_for(0, x.size(0) * args.rows, grain_of(kElementGrain, args.x_row_stride),
                   [&](int64_t begin, int64_t end) { kernels::shuffle_codes(args, begin, end); });
}

Tensor channel_shuffle_meta(const Tensor& x, int64_t groups) {
  constexpr const char* op = "channel_shuffle";
  check_codes(op, "x", x);
  check_rank(op, "x", x, 4);
  check_number(op, "groups", groups);
  TORCH_CHECK_VALUE(x.sym_size(1) % groups == 0, "qtoolkit::channel_shuffle: groups ", groups,
                    " must divide the channels of x ", describe(x));
  return empty_beside(x, x.sym_sizes(), x.scalar_type(), kFormat);
}

Tensor channel_shuffle_cpu(const Tensor& x, int64_t groups) {
  Tensor y = channel_shuffle_meta(x, groups);
  if (y.numel() == 0) return y;
  const int64_t channels = x.size(1), row = x.size(3) * channels;
  shuffle_into(y, x,
               {.rows = x.size(2),
                .columns = x.size(3),
                .x_block_stride = channels,
                .x_row_stride = row,
                .y_block_stride = channels,
                .y_row_stride = row},
               kernels::channel_shuffle(channels, groups));
  return y;
}

Tensor pixel_shuffle_meta(const Tensor& x, int64_t factor) {
  constexpr const char* op = "pixel_shuffle";
  check_codes(op, "x", x);
  check_rank(op, "x", x, 4);
  check_number(op, "factor", factor);
  TORCH_CHECK_VALUE(x.sym_size(1) % (factor * factor) == 0, "qtoolkit::pixel_shuffle: factor ",
                    factor, " squared must divide the channels of x ", describe(x));
  return empty_beside(x,
                      {x.sym_size(0), x.sym_size(1) / (factor * factor), x.sym_size(2) * factor,
                       x.sym_size(3) * factor},
                      x.scalar_type(), kFormat);
}

Tensor pixel_shuffle_cpu(const Tensor& x, int64_t factor) {
  Tensor y = pixel_shuffle_meta(x, factor);
  if (y.numel() == 0) return y;
  const int64_t channels = y.size(1), y_row = y.size(3) * channels;
  shuffle_into(y, x,
               {.rows = x.size(2),
                .columns = x.size(3),
                .x_block_stride = x.size(1),
                .x_row_stride = x.size(3) * x.size(1),
                .y_block_stride = factor * channels,
                .y_row_stride = factor * y_row},
               kernels::pixel_shuffle(channels, factor, y_row));
  return y;
}

Tensor pixel_unshuffle_meta(const Tensor& x, int64_t factor) {
  constexpr const char* op = "pixel_unshuffle";
  check_codes(op, "x", x);
  check_rank(op, "x", x, 4);
  check_number(op, "factor", factor);
  TORCH_CHECK_VALUE(x.sym_size(2) % factor == 0 && x.sym_size(3) % factor == 0,
                    "qtoolkit::pixel_unshuffle: factor ", factor,
                    " must divide height and width of x ", describe(x));
  return empty_beside(x,
                      {x.sym_size(0), x.sym_size(1) * (factor * factor), x.sym_size(2) / factor,
                       x.sym_size(3) / factor},
                      x.scalar_type(), kFormat);
}

Tensor pixel_unshuffle_cpu(const Tensor& x, int64_t factor) {
  Tensor y = pixel_unshuffle_meta(x, factor);
  if (y.numel() == 0) return y;
  const int64_t channels = x.size(1), x_row = x.size(3) * channels;
  shuffle_into(y, x,
               {.rows = y.size(2),
                .columns = y.size(3),
                .x_block_stride = factor * channels,
                .x_row_stride = factor * x_row,
                .y_block_stride = y.size(1),
                .y_row_stride = y.size(3) * y.size(1)},
               kernels::pixel_unshuffle(channels, factor, x_row));
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("channel_shuffle(Tensor x, int groups) -> Tensor", tags);
  m.def("pixel_shuffle(Tensor x, int factor) -> Tensor", tags);
  m.def("pixel_unshuffle(Tensor x, int factor) -> Tensor", tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("channel_shuffle", channel_shuffle_meta);
  m.impl("pixel_shuffle", pixel_shuffle_meta);
  m.impl("pixel_unshuffle", pixel_unshuffle_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("channel_shuffle", channel_shuffle_cpu);
  m.impl("pixel_shuffle", pixel_shuffle_cpu);
  m.impl("pixel_unshuffle", pixel_unshuffle_cpu);
}

}  // namespace qtoolkit::ops
