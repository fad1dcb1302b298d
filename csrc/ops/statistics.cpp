// Statistics of float tensors for observers.
#include "ops/statistics.h"

#include <torch/library.h>

#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "kernels/statistics.h"
#include "ops/checks.h"
#include "ops/float_blocks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

using TensorPair = std::tuple<Tensor, Tensor>;

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

Tensor histogram_meta(const Tensor& x, int64_t bins, double lower, double upper) {
  check_input("histogram", x);
  constexpr int64_t kMostBins = 1 << 24;  // float32 counts no further
  TORCH_CHECK_VALUE(bins >= 1 && bins <= kMostBins, "qtoolkit::histogram: bins must lie in [1, ",
                    kMostBins, "], got ", bins);
  const auto low = static_cast<float>(lower);
  const auto high = static_cast<float>(upper);
  TORCH_CHECK_VALUE(std::isfinite(low) && std::isfinite(high) && low < high &&
                        std::isfinite(high - low) && std::isfinite(bins / (high - low)),
                    "qtoolkit::histogram: lower and upper must be finite float32 values with "
                    "lower < upper and a range that bins can divide, got ",
                    lower, " and ", upper);
  return empty_beside(x, {c10::SymInt(bins)}, at::kLong, at::MemoryFormat::Contiguous);
}

Tensor dense_float(const Tensor& x) {
  return x.to(at::kFloat).contiguous(x.suggest_memory_format());
}

float merge_minimum(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::min(a, b);
}
float merge_maximum(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<float>::quiet_NaN() : std::max(a, b);
}

// args without results; each thread has its own, merged under a lock.
void run_min_max(kernels::MinMaxArgs args, int64_t units, int64_t grain, const TensorPair& result) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto channels = static_cast<size_t>(args.channels);
  float* minimum = std::get<0>(result).mutable_data_ptr<float>();
  float* maximum = std::get<1>(result).mutable_data_ptr<float>();
  std::fill_n(minimum, channels, kInf);
  std::fill_n(maximum, channels, -kInf);
  std::mutex mutex;
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> own_minimum(channels, kInf);
    std::vector<float> own_maximum(channels, -kInf);
    kernels::MinMaxArgs own = args;
    own.minimum = own_minimum.data();
    own.maximum = own_maximum.data();
    kernels::min_max(own, begin, end);
    const std::lock_guard lock(mutex);
    for (size_t c = 0; c < channels; ++c) {
      minimum[c] = merge_minimum(minimum[c], own_minimum[c]);
      maximum[c] = merge_maximum(maximum[c], own_maximum[c]);
    }
  });
}

TensorPair min_max_cpu(const Tensor& x) {
  TensorPair result = min_max_meta(x);
  const ValueRange range = range_of(x);
  *std::get<0>(result).mutable_data_ptr<float>() = range.min;
  *std::get<1>(result).mutable_data_ptr<float>() = range.max;
  return result;
}

TensorPair min_max_per_channel_cpu(const Tensor& x, int64_t ch_axis) {
  TensorPair result = min_max_per_channel_meta(x, ch_axis);
  const Tensor dense = dense_float(x);
  ch_axis = check_ch_axis("min_max_per_channel", x, ch_axis);
  const ChannelView view = channel_view(x.sizes(), ch_axis, x.suggest_memory_format());
  const int64_t rows = view.outer * view.channels;
  // One row is counted in elements.
  const bool one_row = rows == 1;
  run_min_max({.x = dense.const_data_ptr<float>(),
               .outer = view.outer,
               .channels = view.channels,
               .inner = view.inner},
              one_row ? view.inner : rows,
              one_row ? kElementGrain : grain_of(kElementGrain, view.inner), result);
  return result;
}

Tensor histogram_cpu(const Tensor& x, int64_t bins, double lower, double upper) {
  Tensor result = histogram_meta(x, bins, lower, upper);
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  auto* counts = result.mutable_data_ptr<int64_t>();
  std::fill_n(counts, bins, 0);
  std::mutex mutex;
  at::parallel_for(0, x.numel(), std::max(kElementGrain, bins), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(static_cast<size_t>(bins), 0);
    read_floats(dense, begin, end,
                [&](const float* values, int64_t first, int64_t from, int64_t to) {
                  kernels::histogram({.x = values,
                                      .lower = static_cast<float>(lower),
                                      .upper = static_cast<float>(upper),
                                      .bins = bins,
                                      .counts = own.data()},
                                     from - first, to - first);
                });
    const std::lock_guard lock(mutex);
    for (int64_t i = 0; i < bins; ++i) counts[i] += own[i];
  });
  return result;
}

}  // namespace

ValueRange range_of(const Tensor& x) {
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  ValueRange range;
  std::mutex mutex;
  at::parallel_for(0, x.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    ValueRange own;
    kernels::MinMaxArgs args{.minimum = &own.min, .maximum = &own.max};
    read_floats(dense, begin, end,
                [&](const float* values, int64_t first, int64_t from, int64_t to) {
                  args.x = values;
                  kernels::min_max(args, from - first, to - first);
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
  m.def("histogram(Tensor x, int bins, float lower, float upper) -> Tensor", tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("min_max", min_max_meta);
  m.impl("min_max_per_channel", min_max_per_channel_meta);
  m.impl("histogram", histogram_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("min_max", min_max_cpu);
  m.impl("min_max_per_channel", min_max_per_channel_cpu);
  m.impl("histogram", histogram_cpu);
}

}  // namespace qtoolkit::ops
