// Memory layouts of dense tensors. Operators on elements keep channels_last (4-D) and
// channels_last_3d (5-D); whatever else comes in goes out contiguous.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include "ops/huge_pages.h"

namespace qtoolkit::ops {

// A tensor of that shape beside x; works for symbolic shapes and Meta tensors too. A big one on the
// CPU lies in huge pages.
inline at::Tensor empty_beside(const at::Tensor& x, c10::SymIntArrayRef sizes, at::ScalarType dtype,
                               at::MemoryFormat format) {
  const auto known = c10::asIntArrayRefSlowOpt(sizes);
  if (known && x.device().is_cpu() && !x.key_set().has(c10::DispatchKey::Python)) {
    const auto bytes = c10::elementSize(dtype) * c10::multiply_integers(*known);
    if (bytes >= kHugeTensorBytes) {
      const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
      return at::Tensor(
          at::detail::empty_generic(*known, huge_page_allocator(), keys, dtype, format));
    }
  }
  return at::empty_symint(sizes, x.options().dtype(dtype), format);
}

// The number that stands for a format in operator arguments: 0 contiguous, 1 channels_last, 2
// channels_last_3d.
inline int64_t layout_of(at::MemoryFormat format) {
  if (format == at::MemoryFormat::ChannelsLast) return 1;
  return format == at::MemoryFormat::ChannelsLast3d ? 2 : 0;
}

// The format of a tensor of that rank; throws ValueError that names the operator.
inline at::MemoryFormat format_of(const char* op, int64_t layout, int64_t rank) {
  TORCH_CHECK_VALUE(layout == 0 || (layout == 1 && rank == 4) || (layout == 2 && rank == 5),
                    "qtoolkit::", op,
                    ": layout must be 0 (contiguous), 1 (channels_last, of 4 "
                    "dimensions) or 2 (channels_last_3d, of 5 dimensions), got ",
                    layout, " for ", rank, " dimensions");
  if (layout == 1) return at::MemoryFormat::ChannelsLast;
  return layout == 2 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::Contiguous;
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
