#include "kernels/shuffle_plan.h"

#include <algorithm>

namespace qtoolkit::kernels {
namespace {

constexpr int64_t kMostCodes = 16;

// Adds windows that cover the input codes of a piece. `known` are all input codes of the block, in
// ascending order: a window is as wide as it can be among them, because wide ones are read fastest.
void add_windows(std::span<const int64_t> x_offset, std::span<const int64_t> known,
                 std::vector<CodeWindow>& windows) {
  const auto is_known = [&](int64_t at) { return std::ranges::binary_search(known, at); };
  std::vector<int64_t> wanted(x_offset.begin(), x_offset.end());
  std::ranges::sort(wanted);
  for (auto next = wanted.begin(); next != wanted.end();) {
    int64_t first = *next;
    int64_t last = first;
    while (last - first + 1 < kMostCodes && is_known(last + 1)) ++last;
    while (last - first + 1 < kMostCodes && is_known(first - 1)) --first;
    CodeWindow window{
        .x_offset = first, .size = static_cast<int32_t>(last - first + 1), .from = {}};
    std::ranges::fill(window.from, kFromElsewhere);
    for (size_t k = 0; k < x_offset.size(); ++k) {
      if (x_offset[k] < *next || x_offset[k] > last) continue;
      window.from[k] = static_cast<uint8_t>(x_offset[k] - first);
    }
    windows.push_back(window);
    next = std::upper_bound(next, wanted.end(), last);
  }
}

}  // namespace

CodeShuffle plan_shuffle(std::span<const int64_t> x_offset, std::span<const int64_t> y_offset) {
  std::vector<int64_t> known(x_offset.begin(), x_offset.end());
  std::ranges::sort(known);
  CodeShuffle plan;
  for (size_t begin = 0; begin < y_offset.size();) {
    size_t size = 1;
    while (begin + size < y_offset.size() && size < kMostCodes &&
           y_offset[begin + size] == y_offset[begin] + static_cast<int64_t>(size)) {
      ++size;
    }
    const auto first = static_cast<int32_t>(plan.windows.size());
    add_windows(x_offset.subspan(begin, size), known, plan.windows);
    plan.pieces.push_back({.y_offset = y_offset[begin],
                           .size = static_cast<int32_t>(size),
                           .first_window = first,
                           .end_window = static_cast<int32_t>(plan.windows.size())});
    begin += size;
  }
  return plan;
}

CodeShuffle channel_shuffle(int64_t channels, int64_t groups) {
  std::vector<int64_t> from;
  std::vector<int64_t> to;
  for (int64_t k = 0; k < channels; ++k) {
    from.push_back(k % groups * (channels / groups) + k / groups);
    to.push_back(k);
  }
  return plan_shuffle(from, to);
}

CodeShuffle pixel_shuffle(int64_t channels, int64_t factor, int64_t y_row_stride) {
  std::vector<int64_t> from;
  std::vector<int64_t> to;
  for (int64_t row = 0; row < factor; ++row) {
    for (int64_t column = 0; column < factor; ++column) {
      for (int64_t c = 0; c < channels; ++c) {
        from.push_back((c * factor + row) * factor + column);
        to.push_back(row * y_row_stride + column * channels + c);
      }
    }
  }
  return plan_shuffle(from, to);
}

CodeShuffle pixel_unshuffle(int64_t channels, int64_t factor, int64_t x_row_stride) {
  std::vector<int64_t> from;
  std::vector<int64_t> to;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t row = 0; row < factor; ++row) {
      for (int64_t column = 0; column < factor; ++column) {
        from.push_back(row * x_row_stride + column * channels + c);
        to.push_back((c * factor + row) * factor + column);
      }
    }
  }
  return plan_shuffle(from, to);
}

}  // namespace qtoolkit::kernels
