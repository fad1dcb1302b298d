// Rows of pixels, for kernels that work on a stretch of elements.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/value.h"

namespace qtoolkit::engine {

// Pixels in a unit of work of an element-wise task: about 16 KB of codes, so that what one step
// writes the next finds in a near cache, and threads get even shares.
inline int64_t rows_per_unit(const View& view) {
  constexpr int64_t kBytes = int64_t{1} << 14;
  const int64_t row = std::max<int64_t>(view.shape.width * view.shape.channels, 1);
  return std::max<int64_t>(1, kBytes / row);
}

inline int64_t row_units(const View& view) {
  const int64_t rows = rows_per_unit(view);
  return (view.shape.rows() + rows - 1) / rows;
}

// Calls body(row) for the rows of units [begin, end).
template <class Body>
void for_rows(const View& view, int64_t begin, int64_t end, const Body& body) {
  const int64_t rows = rows_per_unit(view);
  const int64_t last = std::min(end * rows, view.shape.rows());
  for (int64_t row = begin * rows; row < last; ++row) body(row);
}

// Calls body(first, count) for stretches of those rows that lie in one image.
template <class Body>
void for_row_spans(const View& view, int64_t begin, int64_t end, const Body& body) {
  const int64_t rows = rows_per_unit(view), height = view.shape.height;
  const int64_t last = std::min(end * rows, view.shape.rows());
  for (int64_t row = begin * rows; row < last;) {
    const int64_t next = std::min(last, (row / height + 1) * height);
    body(row, next - row);
    row = next;
  }
}

}  // namespace qtoolkit::engine
