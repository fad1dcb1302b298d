// Memory layouts of dense tensors. Operators on elements keep channels_last (4-D) and
// channels_last_3d (5-D); whatever else comes in goes out contiguous.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace qtoolkit::ops {

// A tensor of that shape beside x; works for symbolic shapes and Meta tensors too.
inline at::Tensor empty_beside(const at::Tensor& x, c10::SymIntArrayRef sizes, at::ScalarType dtype,
                               at::MemoryFormat format) {
  return at::empty_symint(sizes, x.options().dtype(dtype), format);
}

// Dense memory seen as [outer, channels, inner], channels being dimension `axis`.
struct ChannelView {
  int64_t outer = 1, channels = 1, inner = 1;
};

inline ChannelView channel_view(at::IntArrayRef sizes, int64_t axis, at::MemoryFormat format) {
  const auto rank = static_cast<int64_t>(sizes.size());
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  // The place of a dimension in memory: channels_last moves dimension 1 to the end.
  const auto place = [&](int64_t d) { return channels_last && d == 1 ? rank : d; };
  ChannelView view{1, sizes[axis], 1};
  for (int64_t d = 0; d < rank; ++d) {
    if (place(d) < place(axis)) view.outer *= sizes[d];
    if (place(d) > place(axis)) view.inner *= sizes[d];
  }
  return view;
}

}  // namespace qtoolkit::ops
