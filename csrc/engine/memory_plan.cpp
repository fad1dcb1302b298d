#include "engine/memory_plan.h"

#include <algorithm>
#include <cstring>

namespace qtoolkit::engine {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMostBytes = int64_t{1} << 34;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool meet(const Lifetime& a, const Lifetime& b) { return a.first <= b.last && b.first <= a.last; }

struct Range {
  int64_t begin, end;
};
Range range_of(const View& view) {
  return {view.first_byte(), view.first_byte() + aligned(view.bytes())};
}
bool meet(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }

// True if the two views put the same border into the same bytes.
bool same_border(const View& a, const View& b) {
  return a.start == b.start && a.shape == b.shape && a.border == b.border &&
         a.zero_point == b.zero_point && a.type == b.type;
}

}  // namespace

int64_t place(std::vector<Block>& blocks) {
  // The largest first, each at the lowest free place among those that are alive with it.
  std::vector<Block*> order;
  for (Block& block : blocks) order.push_back(&block);
  std::stable_sort(order.begin(), order.end(), [](const Block* a, const Block* b) {
    return a->view->bytes() > b->view->bytes();
  });
  int64_t bytes = 0;
  std::vector<Block*> placed;
  for (Block* block : order) {
    const int64_t size = aligned(block->view->bytes());
    std::vector<Range> taken;
    for (const Block* other : placed) {
      if (meet(block->lifetime, other->lifetime)) taken.push_back(range_of(*other->view));
    }
    std::sort(taken.begin(), taken.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    int64_t at = 0;
    for (const Range& range : taken) {
      if (range.begin >= at + size) break;
      at = std::max(at, range.end);
    }
    View& view = *block->view;
    view.start = at - view.first_byte() + view.start;
    bytes = std::max(bytes, at + size);
    require(bytes <= kMostBytes, "the values need more than ", kMostBytes, " bytes");
    placed.push_back(block);
  }
  for (Block& block : blocks) {
    for (const Block& other : blocks) {
      if (&other == &block || !meet(range_of(*block.view), range_of(*other.view))) continue;
      if (!same_border(*block.view, *other.view)) block.border_is_shared = true;
    }
  }
  return bytes + kArenaSlack;
}

void fill_border(const View& view, const Memory& memory, int64_t begin, int64_t end) {
  const int64_t height = view.shape.height + 2 * view.border.height;
  const int64_t side = view.border.width * view.pixel_stride;
  const int64_t inner = view.shape.width * view.pixel_stride;
  uint8_t* const base = memory.arena + view.first_byte();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i % height;
    uint8_t* const at = base + i / height * view.image_stride + row * view.row_stride;
    if (row < view.border.height || row >= height - view.border.height) {
      std::memset(at, view.zero_point, static_cast<size_t>(view.row_stride));
    } else {
      std::memset(at, view.zero_point, static_cast<size_t>(side));
      std::memset(at + side + inner, view.zero_point, static_cast<size_t>(side));
    }
  }
}

}  // namespace qtoolkit::engine
