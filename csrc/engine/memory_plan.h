// Where the values of one size of inputs lie in the arena.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/value.h"

namespace qtoolkit::engine {

// A value that needs memory from step `first`, which writes it, to step `last`, its last reader.
struct Lifetime {
  int64_t first = 0, last = 0;
};

struct Block {
  View* view = nullptr;  // its start is set
  Lifetime lifetime;
  // Set: true if the border must be filled before each run of the step that writes it, false if
  // filling it once lasts.
  bool border_is_shared = false;
};

// Bytes behind the last value that kernels may read.
inline constexpr int64_t kArenaSlack = 128;

// Places values so that those alive at the same time do not overlap; returns the arena's bytes.
int64_t place(std::vector<Block>& blocks);

// Writes the zero point into rows [begin, end) of the borders of all images of a view, counted as
// rows of the bordered images.
void fill_border(const View& view, const Memory& memory, int64_t begin, int64_t end);
inline int64_t bordered_rows(const View& view) {
  const Border& border = view.border;
  if (border == Border{}) return 0;
  return view.shape.images * (view.shape.height + 2 * border.height);
}

}  // namespace qtoolkit::engine
