#include "kernels/windows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace qtoolkit::kernels {

int64_t Spans::longest() const {
  int64_t result = 0;
  for (size_t i = 0; i < begin.size(); ++i) result = std::max(result, end[i] - begin[i]);
  return result;
}

Spans max_pool_spans(int64_t size, int64_t count, const Window& window) {
  Spans spans;
  for (int64_t i = 0; i < count; ++i) {
    int64_t begin = i * window.stride - window.padding;
    const int64_t end = std::min(begin + window.extent(), size);
    if (begin < 0) begin += (-begin + window.dilation - 1) / window.dilation * window.dilation;
    if (begin >= end) {
      throw std::invalid_argument("window " + std::to_string(i) +
                                  " lies in the padding alone; use less padding or dilation");
    }
    spans.begin.push_back(begin);
    spans.end.push_back(end);
  }
  return spans;
}

Spans avg_pool_spans(int64_t size, int64_t count, const Window& window, bool count_include_pad) {
  Spans spans;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = i * window.stride - window.padding;
    const int64_t stop = std::min(start + window.kernel, size + window.padding);
    spans.begin.push_back(std::max<int64_t>(start, 0));
    spans.end.push_back(std::min(stop, size));
    spans.divisor.push_back(count_include_pad ? stop - start
                                              : spans.end.back() - spans.begin.back());
  }
  return spans;
}

Spans adaptive_pool_spans(int64_t size, int64_t count) {
  Spans spans;
  for (int64_t i = 0; i < count; ++i) {
    spans.begin.push_back(i * size / count);
    spans.end.push_back(((i + 1) * size + count - 1) / count);
    spans.divisor.push_back(spans.end.back() - spans.begin.back());
  }
  return spans;
}

}  // namespace qtoolkit::kernels
