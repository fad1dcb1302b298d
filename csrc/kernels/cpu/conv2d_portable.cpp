#include <algorithm>
#include <cstring>

#include "kernels/conv2d_input.h"
#include "kernels/conv2d_output.h"
#include "kernels/conv2d_steps.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::portable {
namespace {

// Adds one run's products to the accumulators of a block of channels at one pixel.
void accumulate_run(const uint8_t* x, const int8_t* w, int64_t quads, int32_t* acc) {
  for (int64_t quad = 0; quad < quads; ++quad, x += 4, w += 4 * kChannelBlock) {
    const int32_t x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
    for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
      acc[lane] = wrapping_add(acc[lane], x0 * w[4 * lane] + x1 * w[4 * lane + 1] +
                                              x2 * w[4 * lane + 2] + x3 * w[4 * lane + 3]);
    }
  }
}

// One pixel's sums from quads of input bytes.
void accumulate_quads(const Conv2dArgs& args, const uint8_t* x, int64_t block, int32_t* acc) {
  const Conv2dShape& s = args.shape;
  const int64_t runs = s.runs_per_row();
  const int64_t run_weights = s.run_quads() * 4 * kChannelBlock;
  const int64_t sums = args.layout == Conv2dLayout::summed_quads ? kBlockSumBytes : 0;
  const int8_t* w = args.packed + block * (sums + s.kernel_height * runs * run_weights) + sums;
  for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
    for (int64_t run = 0; run < runs; ++run, w += run_weights) {
      accumulate_run(x + ky * s.dilation_height * args.x_row_stride +
                         run * s.dilation_width * args.x_pixel_stride,
                     w, s.run_quads(), acc);
    }
  }
}

void accumulate_steps(const Conv2dArgs& args, const uint8_t* x, int64_t block, int32_t* acc) {
  const Conv2dMoves moves = conv2d_moves(args.shape, args.x_row_stride, args.x_pixel_stride);
  for (int64_t list = 0; list < kListsPerBlock; ++list, acc += kStepChannels) {
    const Conv2dSteps steps = conv2d_steps(args.packed, block * kListsPerBlock + list);
    int64_t at = 0;
    for (int64_t step = 0; step < steps.count; ++step) {
      at += moves.bytes[steps.move[step]];
      const int8_t* const w = steps.weight + step * kStepBytes;
      for (int64_t i = 0; i < kStepBytes; ++i) {
        acc[i / 4] = wrapping_add(acc[i / 4], x[at + i % 4] * w[i]);
      }
    }
  }
}

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const int64_t tiles = conv2d_tiles(s);
  const auto accumulate = args.layout == Conv2dLayout::steps ? accumulate_steps : accumulate_quads;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t group = block / s.blocks_per_group();
    const int64_t first_channel = block % s.blocks_per_group() * kChannelBlock;
    const int64_t channels = std::min(kChannelBlock, s.out_channels - first_channel);
    const int64_t first_pixel = unit % tiles * kTilePixels;
    const int64_t last_pixel = std::min(first_pixel + kTilePixels, s.pixels());
    for (int64_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
      const uint8_t* x = conv2d_input(args, pixel) + group * s.in_channels;
      int32_t acc[kChannelBlock];
      std::memcpy(acc, args.offset + block * kChannelBlock, sizeof(acc));
      accumulate(args, x, block, acc);
      store_conv2d_outputs(args, conv2d_place(args, pixel), group * s.out_channels + first_channel,
                           channels, acc, args.multiplier + block * kChannelBlock);
    }
  }
}

}  // namespace qtoolkit::kernels::portable
