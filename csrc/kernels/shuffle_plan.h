// What shuffle_codes is told to do.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/move.h"

namespace qtoolkit::kernels {

struct CodeShuffle {
  std::vector<CodePiece> pieces;
  std::vector<CodeWindow> windows;
};
// The pieces of a block whose output code y_offset[k] is input code x_offset[k]. Codes that
// lie side by side in y stand side by side in the lists.
CodeShuffle plan_shuffle(std::span<const int64_t> x_offset, std::span<const int64_t> y_offset);

// A block is a pixel: channels seen as [groups, channels / groups] and transposed.
CodeShuffle channel_shuffle(int64_t channels, int64_t groups);
// A block is an input pixel of channels * factor^2 codes; it becomes factor rows, y_row_stride
// bytes apart, of factor pixels.
CodeShuffle pixel_shuffle(int64_t channels, int64_t factor, int64_t y_row_stride);
// The inverse: a block is an output pixel.
CodeShuffle pixel_unshuffle(int64_t channels, int64_t factor, int64_t x_row_stride);

}  // namespace qtoolkit::kernels
