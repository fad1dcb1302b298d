#include "ops/strided.h"

namespace qtoolkit::ops {

int64_t StridedLayout::count() const {
  int64_t product = 1;
  for (const Dimension& dimension : dimensions) product *= dimension.size;
  return product;
}

StridedLayout layout_in_memory(const at::Tensor& x, int64_t apart) {
  StridedLayout layout;
  std::vector<StridedLayout::Dimension> sorted;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != apart && x.stride(d) == 0) {
      layout.repeats *= x.size(d);
    } else if (d == apart || x.size(d) != 1) {
      sorted.push_back({x.size(d), x.stride(d), d == apart});
    }
  }
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return a.stride > b.stride; });
  for (const auto& inner : sorted) {
    if (!layout.dimensions.empty()) {
      auto& outer = layout.dimensions.back();
      if (!inner.apart && !outer.apart && outer.stride == inner.size * inner.stride) {
        outer = {outer.size * inner.size, inner.stride, false};
        continue;
      }
    }
    layout.dimensions.push_back(inner);
  }
  if (layout.dimensions.empty()) layout.dimensions.push_back({1, 1, false});
  return layout;
}

}  // namespace qtoolkit::ops
