// Which output pixels a tile of the AVX-512 convolution holds, where they lie and where their input
// does. Everything is internal.
#pragma once

#include "kernels/conv2d_output.h"
#include "kernels/cpu/conv2d_cursor.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// Two units of work at once, where there are two.
constexpr int kMostPixels = 2 * static_cast<int>(kTilePixels);
static_assert(kMostPixels == 14);

// Up to kMostPixels output pixels.
struct Tile {
  int pixels;
  int64_t ahead;  // where weights are asked for, in bytes from those that are used
  // True if they are runs of kTilePixels pixels, each within a row. Then only the runs' first
  // pixels are given, else all.
  bool in_runs;
  Position run[2];
  const uint8_t* x[kMostPixels];
  Conv2dPlace place[kMostPixels];
};

// Keeps GCC from computing addresses in vector registers, on whose ports the multiply-adds are.
inline int64_t scalar(int64_t value) {
  asm("" : "+r"(value));
  return value;
}

// The next `pixels` pixels; as runs only if `runs_wanted`.
inline void take(Cursor<kTilePixels>& cursor, int pixels, bool runs_wanted, Tile& tile) {
  tile.pixels = pixels;
  tile.in_runs = false;
  if (runs_wanted && (pixels == kMostPixels || pixels == kTilePixels)) {
    const Cursor<kTilePixels> start = cursor;
    tile.in_runs =
        cursor.take_run(tile.run[0]) && (pixels == kTilePixels || cursor.take_run(tile.run[1]));
    if (tile.in_runs) return;
    cursor = start;
  }
  cursor.take(pixels, tile.x, tile.place);
}

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
