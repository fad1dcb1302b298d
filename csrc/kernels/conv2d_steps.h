// Conv2dLayout::steps: weights for vpmaddubsw, which multiplies unsigned codes by signed weights
// and adds two neighbouring products in 16 bits, saturating. A step is four consecutive bytes of
// input, from any byte of a run on, and their weights for eight output channels. In each pair of
// its weights the positive ones sum to 128 at most and so do the negative ones' absolute values:
// 255 * 128 fits, so nothing saturates, whatever the input. Where neighbours would exceed that,
// steps overlap, and the weight of a byte is the sum of what the steps have for it. A trained
// layer needs a few percent more steps than bytes / 4, the worst weights twice as many.
#pragma once

#include <cstdint>

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// A list of steps belongs to one octet of output channels: four in each block. It goes through all
// runs; each has a step at its first byte.
inline constexpr int64_t kStepChannels = 8;
inline constexpr int64_t kStepBytes = 4 * kStepChannels;
inline constexpr int64_t kListsPerBlock = kChannelBlock / kStepChannels;
// The most that the sums above may be.
inline constexpr int32_t kStepPairBound = 128;

// How a step is found from the one before it: so many bytes on; or, kMoveToRun + i and
// kMoveToRow + i, at the beginning of the kernel row's next run or of the next kernel row from i
// bytes before a run's last quad, where i < 4.
inline constexpr int64_t kStepMoves = 16;
inline constexpr int64_t kMoveToRun = 8, kMoveToRow = 12;

// The packed bytes begin with one of these for each list. Offsets are from its own first byte, so
// that the packed bytes of some blocks begin with their lists.
struct Conv2dStepList {
  int64_t steps;
  int64_t weight;  // offset of [steps][kStepChannels][4], at a cache line
  int64_t move;    // offset of [steps], each below kStepMoves
};

// A list's steps.
struct Conv2dSteps {
  int64_t count;
  const int8_t* weight;
  const uint8_t* move;
};
// `packed` begins with the block's lists.
static inline Conv2dSteps conv2d_steps(const int8_t* packed, int64_t list) {
  const int8_t* const from = packed + list * static_cast<int64_t>(sizeof(Conv2dStepList));
  Conv2dStepList at;
  __builtin_memcpy(&at, from, sizeof(at));
  return {at.steps, from + at.weight, reinterpret_cast<const uint8_t*>(from + at.move)};
}

static inline int64_t conv2d_step_lists(const Conv2dShape& s) {
  return s.groups * s.blocks_per_group() * kListsPerBlock;
}

// The bytes that each move goes.
struct Conv2dMoves {
  int64_t bytes[kStepMoves];
};
static inline Conv2dMoves conv2d_moves(const Conv2dShape& s, int64_t x_row_stride,
                                       int64_t x_pixel_stride) {
  Conv2dMoves moves;
  for (int64_t i = 0; i < kMoveToRun; ++i) moves.bytes[i] = i;
  const int64_t run = s.dilation_width * x_pixel_stride;
  const int64_t last = 4 * s.run_quads() - 4;
  const int64_t row = s.dilation_height * x_row_stride - (s.runs_per_row() - 1) * run;
  for (int64_t i = 0; i < 4; ++i) {
    moves.bytes[kMoveToRun + i] = run - last + i;
    moves.bytes[kMoveToRow + i] = row - last + i;
  }
  return moves;
}

}  // namespace qtoolkit::kernels
