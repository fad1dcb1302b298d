// Statistics of float tensors for observers.
#include "ops/statistics.h"

#include <torch/library.h>

#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <tuple>
#include <vector>

#include "kernels/statistics.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"
#include "ops/strided.h"

namespace qtoolkit::ops {
namespace {

using TensorPair = std::tuple<Tensor, Tensor>;
using TensorTriple = std::tuple<Tensor, Tensor, Tensor>;

void check_input(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.sym_numel() != 0, "qtoolkit::", op, ": x is empty, ", describe(x),
                    "; it has no statistics");
}

TensorPair empty_pair(const Tensor& x, c10::SymIntArrayRef sizes) {
  const auto format = at::MemoryFormat::Contiguous;
  return {empty_beside(x, sizes, at::kFloat, format), empty_beside(x, sizes, at::kFloat, format)};
}

TensorPair min_max_meta(const Tensor& x) {
  check_input("min_max", x);
  return empty_pair(x, {});
}

TensorPair min_max_per_channel_meta(const Tensor& x, int64_t ch_axis) {
  check_input("min_max_per_channel", x);
  ch_axis = check_ch_axis("min_max_per_channel", x, ch_axis);
  return empty_pair(x, x.sym_sizes().slice(ch_axis, 1));
}

TensorPair min_max_per_group_meta(const Tensor& x, int64_t group_size, int64_t axis) {
  check_input("min_max_per_group", x);
  axis = check_ch_axis("min_max_per_group", x, axis);
  TORCH_CHECK_VALUE(group_size >= 1,
                    "qtoolkit::min_max_per_group: group_size must be positive, got ", group_size);
  c10::SymDimVector sizes(x.sym_sizes());
  sizes[axis] = (sizes[axis] + (group_size - 1)) / group_size;
  return empty_pair(x, sizes);
}

Tensor empty_counts(const char* op, const Tensor& x, int64_t bins, double lower, double upper) {
  check_input(op, x);
  constexpr int64_t kMostBins = 1 << 24;  // float32 counts no further
  TORCH_CHECK_VALUE(bins >= 1 && bins <= kMostBins, "qtoolkit::", op, ": bins must lie in [1, ",
                    kMostBins, "], got ", bins);
  const auto low = static_cast<float>(lower);
  const auto high = static_cast<float>(upper);
  TORCH_CHECK_VALUE(std::isfinite(low) && std::isfinite(high) && low < high &&
                        std::isfinite(high - low) && std::isfinite(bins / (high - low)),
                    "qtoolkit::", op,
                    ": lower and upper must be finite float32 values with "
                    "lower < upper and a range that bins can divide, got ",
                    lower, " and ", upper);
  return empty_beside(x, {c10::SymInt(bins)}, at::kLong, at::MemoryFormat::Contiguous);
}

Tensor histogram_meta(const Tensor& x, int64_t bins, double lower, double upper) {
  return empty_counts("histogram", x, bins, lower, upper);
}

TensorTriple histogram_min_max_meta(const Tensor& x, int64_t bins, double lower, double upper) {
  const Tensor counts = empty_counts("histogram_min_max", x, bins, lower, upper);
  const TensorPair extremes = empty_pair(x, {});
  return {counts, std::get<0>(extremes), std::get<1>(extremes)};
}

float merge_minimum(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::min(a, b);
}
float merge_maximum(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::max(a, b);
}

// The extremes of several columns, which threads take apart and merge.
struct Extremes {
  explicit Extremes(int64_t columns)
      : minimum(static_cast<size_t>(columns), std::numeric_limits<float>::infinity()),
        maximum(static_cast<size_t>(columns), -std::numeric_limits<float>::infinity()) {}

  // One column takes values.
  void take(int64_t column, const float* values, int64_t count) {
    kernels::min_max({.x = values,
                      .inner = count,
                      .minimum = &minimum[static_cast<size_t>(column)],
                      .maximum = &maximum[static_cast<size_t>(column)]},
                     0, count);
  }
  // All columns, or those from `column` on, take a value each, again and again.
  void take_across(int64_t column, const float* values, int64_t count) {
    const auto columns = static_cast<int64_t>(minimum.size());
    while (count > 0) {
      const int64_t rows = column == 0 ? count / columns : 0;
      const int64_t part = rows > 0 ? rows * columns : std::min(count, columns - column);
      kernels::min_max({.x = values,
                        .outer = std::max<int64_t>(rows, 1),
                        .channels = rows > 0 ? columns : part,
                        .inner = 1,
                        .minimum = &minimum[static_cast<size_t>(column)],
                        .maximum = &maximum[static_cast<size_t>(column)]},
                       0, part);
      values += part;
      count -= part;
      column = 0;
    }
  }
  void merge_into(const TensorPair& result, const auto& channel_of) const {
    float* low = std::get<0>(result).mutable_data_ptr<float>();
    float* high = std::get<1>(result).mutable_data_ptr<float>();
    for (size_t i = 0; i < minimum.size(); ++i) {
      const int64_t c = channel_of(static_cast<int64_t>(i));
      low[c] = merge_minimum(low[c], minimum[i]);
      high[c] = merge_maximum(high[c], maximum[i]);
    }
  }

  std::vector<float> minimum, maximum;
};

void fill(const TensorPair& result, ValueRange range) {
  std::get<0>(result).fill_(range.min);
  std::get<1>(result).fill_(range.max);
}

TensorPair min_max_cpu(const Tensor& x) {
  TensorPair result = min_max_meta(x);
  fill(result, range_of(x));
  return result;
}

TensorPair min_max_per_channel_cpu(const Tensor& x, int64_t ch_axis) {
  // Fewer elements of a channel side by side are not worth a call of their own.
  constexpr int64_t kShortRun = 32;
  // Columns are repeated until they fill whole vectors, unless there are many.
  constexpr int64_t kWholeVectors = 64, kMostColumns = 4096;
  TensorPair result = min_max_per_channel_meta(x, ch_axis);
  ch_axis = check_ch_axis("min_max_per_channel", x, ch_axis);
  const int64_t channels = x.size(ch_axis);
  if (channels == 1 || x.stride(ch_axis) == 0) {
    fill(result, range_of(x.select(ch_axis, 0)));
    return result;
  }
  fill(result, {});
  const StridedLayout layout = layout_in_memory(x, ch_axis);
  int64_t inside = 1;  // elements of a channel that follow each other
  for (size_t d = layout.dimensions.size(); !layout.dimensions[--d].apart;) {
    inside *= layout.dimensions[d].size;
  }
  std::mutex mutex;
  if (inside >= kShortRun) {
    at::parallel_for(0, layout.count(), kElementGrain, [&](int64_t begin, int64_t end) {
      Extremes own(channels);
      read_strided(
          x, layout, begin, end,
          [&](const float* values, int64_t count, int64_t first) {
            own.take(first / inside % channels, values, count);
          },
          inside);
      const std::lock_guard lock(mutex);
      own.merge_into(result, [](int64_t c) { return c; });
    });
    return result;
  }
  const int64_t columns = channels * inside;
  const StridedLayout merged = layout_in_memory(x);  // in the same order
  const int64_t repeated = columns / std::gcd(columns, kWholeVectors) * kWholeVectors;
  const int64_t width = repeated <= kMostColumns ? repeated : columns;
  at::parallel_for(0, merged.count(), kElementGrain, [&](int64_t begin, int64_t end) {
    Extremes own(width);
    read_strided(x, merged, begin, end, [&](const float* values, int64_t count, int64_t first) {
      own.take_across(first % width, values, count);
    });
    const std::lock_guard lock(mutex);
    own.merge_into(result, [&](int64_t column) { return column % columns / inside; });
  });
  return result;
}

TensorPair min_max_per_group_cpu(const Tensor& x, int64_t group_size, int64_t axis) {
  const TensorPair result = min_max_per_group_meta(x, group_size, axis);
  axis = check_ch_axis("min_max_per_group", x, axis);
  // Rows along the axis, in the order of the other dimensions: those of the result, whose groups
  // come last until the end.
  const Tensor rows = x.movedim(axis, -1);
  const int64_t length = rows.size(-1), groups = (length + group_size - 1) / group_size;
  StridedLayout layout;
  for (int64_t d = 0; d < rows.dim(); ++d) {
    layout.dimensions.push_back({rows.size(d), rows.stride(d), false});
  }
  std::vector<int64_t> sizes = rows.sizes().vec();
  sizes.back() = groups;
  const TensorPair found = {at::empty(sizes, x.options().dtype(at::kFloat)),
                            at::empty(sizes, x.options().dtype(at::kFloat))};
  fill(found, {});
  float* minimum = std::get<0>(found).mutable_data_ptr<float>();
  float* maximum = std::get<1>(found).mutable_data_ptr<float>();
  const auto take = [&](const float* values, int64_t count, int64_t first) {
    while (count > 0) {
      const int64_t place = first % length;
      const int64_t group = first / length * groups + place / group_size;
      const int64_t left = std::min(group_size - place % group_size, length - place);
      const int64_t whole = left == group_size ? std::min(count, length - place) / group_size : 0;
      const int64_t part = whole > 1 ? whole * group_size : std::min(count, left);
      kernels::MinMaxArgs args{
          .x = values, .inner = part, .minimum = minimum + group, .maximum = maximum + group};
      if (whole > 1) {
        args.channels = whole;
        args.inner = group_size;
      }
      kernels::min_max(args, 0, whole > 1 ? whole : part);
      values += part;
      count -= part;
      first += part;
    }
  };
  const int64_t row_count = x.numel() / length;
  at::parallel_for(0, row_count, grain_of(kElementGrain, length), [&](int64_t begin, int64_t end) {
    read_strided(x, layout, begin * length, end * length, take);
  });
  std::get<0>(result).copy_(std::get<0>(found).movedim(-1, axis));
  std::get<1>(result).copy_(std::get<1>(found).movedim(-1, axis));
  return result;
}

// Fills `result` with counts, and `range` with the extremes of x, unless it is absent.
void count(const Tensor& x, double lower, double upper, const Tensor& result, ValueRange* range) {
  const int64_t bins = result.numel();
  const StridedLayout layout = layout_in_memory(x);
  auto* counts = result.mutable_data_ptr<int64_t>();
  std::fill_n(counts, bins, 0);
  std::mutex mutex;
  const int64_t grain = std::max(kElementGrain, bins);
  at::parallel_for(0, layout.count(), grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(static_cast<size_t>(bins), 0);
    ValueRange extremes;
    kernels::HistogramArgs args{.lower = static_cast<float>(lower),
                                .upper = static_cast<float>(upper),
                                .bins = bins,
                                .counts = own.data()};
    if (range != nullptr) {
      args.minimum = &extremes.min;
      args.maximum = &extremes.max;
    }
    read_strided(x, layout, begin, end, [&](const float* values, int64_t size, int64_t) {
      args.x = values;
      kernels::histogram(args, 0, size);
    });
    const std::lock_guard lock(mutex);
    for (int64_t i = 0; i < bins; ++i) counts[i] += own[i] * layout.repeats;
    if (range != nullptr) {
      *range = {merge_minimum(range->min, extremes.min), merge_maximum(range->max, extremes.max)};
    }
  });
}

Tensor histogram_cpu(const Tensor& x, int64_t bins, double lower, double upper) {
  Tensor result = histogram_meta(x, bins, lower, upper);
  count(x, lower, upper, result, nullptr);
  return result;
}

TensorTriple histogram_min_max_cpu(const Tensor& x, int64_t bins, double lower, double upper) {
  TensorTriple result = histogram_min_max_meta(x, bins, lower, upper);
  ValueRange range;
  count(x, lower, upper, std::get<0>(result), &range);
  fill({std::get<1>(result), std::get<2>(result)}, range);
  return result;
}

}  // namespace

ValueRange range_of(const Tensor& x) {
  const StridedLayout layout = layout_in_memory(x);
  ValueRange range;
  std::mutex mutex;
  at::parallel_for(0, layout.count(), kElementGrain, [&](int64_t begin, int64_t end) {
    ValueRange own;
    kernels::MinMaxArgs args{.minimum = &own.min, .maximum = &own.max};
    read_strided(x, layout, begin, end, [&](const float* values, int64_t size, int64_t) {
      args.x = values;
      kernels::min_max(args, 0, size);
    });
    const std::lock_guard lock(mutex);
    range = {merge_minimum(range.min, own.min), merge_maximum(range.max, own.max)};
  });
  return range;
}

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("min_max(Tensor x) -> (Tensor, Tensor)", tags);
  m.def("min_max_per_channel(Tensor x, int ch_axis) -> (Tensor, Tensor)", tags);
  m.def("min_max_per_group(Tensor x, int group_size, int axis) -> (Tensor, Tensor)", tags);
  m.def("histogram(Tensor x, int bins, float lower, float upper) -> Tensor", tags);
  m.def(
      "histogram_min_max(Tensor x, int bins, float lower, float upper) -> (Tensor, Tensor, Tensor)",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("min_max", min_max_meta);
  m.impl("min_max_per_channel", min_max_per_channel_meta);
  m.impl("min_max_per_group", min_max_per_group_meta);
  m.impl("histogram", histogram_meta);
  m.impl("histogram_min_max", histogram_min_max_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("min_max", min_max_cpu);
  m.impl("min_max_per_channel", min_max_per_channel_cpu);
  m.impl("min_max_per_group", min_max_per_group_cpu);
  m.impl("histogram", histogram_cpu);
  m.impl("histogram_min_max", histogram_min_max_cpu);
}

}  // namespace qtoolkit::ops
