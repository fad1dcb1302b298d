// The windows of pooling, as torch.nn.functional has them, cut to the input.
#pragma once

#include <cstdint>
#include <vector>

namespace qtoolkit::kernels {

// One dimension of a pooling.
struct Window {
  int64_t kernel = 1, stride = 1, padding = 0, dilation = 1;
  bool ceil_mode = false;

  int64_t extent() const { return (kernel - 1) * dilation + 1; }
};

// Begin and end of each window; divisor is for averages only.
struct Spans {
  std::vector<int64_t> begin, end, divisor;

  int64_t longest() const;
};

// `count` windows on `size` elements. Throws std::invalid_argument if one lies in the padding
// alone.
Spans max_pool_spans(int64_t size, int64_t count, const Window& window);
Spans avg_pool_spans(int64_t size, int64_t count, const Window& window, bool count_include_pad);
Spans adaptive_pool_spans(int64_t size, int64_t count);

// How many windows fit: in ceil mode a last partial one counts if it starts inside the input or its
// left padding. Size is int64_t or a symbolic integer.
template <class Size>
Size window_count(const Size& size, const Window& window) {
  const Size room =
      size + 2 * window.padding - window.extent() + (window.ceil_mode ? window.stride - 1 : 0);
  Size count = room / window.stride + 1;
  if (window.ceil_mode && (count - 1) * window.stride >= size + window.padding) count = count - 1;
  return count;
}

}  // namespace qtoolkit::kernels
