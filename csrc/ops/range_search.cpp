// Searches of the range that loses least when it is quantized, and wider ranges of histograms, for
// observers.
#include "kernels/range_search.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <span>
#include <tuple>
#include <vector>

#include "core/value_range.h"
#include "kernels/range_errors.h"
#include "ops/checks.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

using TensorPair = std::tuple<Tensor, Tensor>;

constexpr int64_t kMostBins = 1 << 24;
constexpr int64_t kMostLevels = 1 << 16;
// Squared errors are computed for ends of the range at so many parts of it.
constexpr int64_t kParts = 100;

TensorPair empty_pair(const Tensor& x, c10::SymIntArrayRef sizes) {
  const auto options = x.options().dtype(at::kFloat);
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

TensorPair check_histogram(const char* op, const Tensor& counts, const Tensor& min_val,
                           const Tensor& max_val) {
  check_dtype(op, "counts", counts, at::kLong);
  check_rank(op, "counts", counts, 1);
  TORCH_CHECK_VALUE(counts.sym_numel() >= 1 && counts.sym_numel() <= kMostBins, "qtoolkit::", op,
                    ": counts must have from 1 to ", kMostBins, " bins, got ", describe(counts));
  for (const auto& [name, bound] : {std::pair{"min_val", min_val}, std::pair{"max_val", max_val}}) {
    check_dtype(op, name, bound, at::kFloat);
    check_device(op, name, bound, counts);
    TORCH_CHECK_VALUE(bound.sym_numel() == 1, "qtoolkit::", op, ": ", name,
                      " must hold one element, got ", describe(bound));
  }
  return empty_pair(counts, {});
}

void check_levels(const char* op, int64_t levels) {
  TORCH_CHECK_VALUE(levels >= 2 && levels <= kMostLevels, "qtoolkit::", op,
                    ": levels must lie in [2, ", kMostLevels, "], got ", levels);
}

// A histogram that has been checked: counts over [range.min, range.max].
struct Histogram {
  Tensor counts;
  ValueRange range;

  std::span<const int64_t> bins() const {
    return {counts.const_data_ptr<int64_t>(), static_cast<size_t>(counts.numel())};
  }
  // Divided first, as the difference of two float32 may be beyond float32.
  float width() const {
    const auto count = static_cast<float>(counts.numel());
    return range.max / count - range.min / count;
  }
  int64_t zero_bin() const {
    const float place = -range.min / width();
    const float last = static_cast<float>(counts.numel() - 1);
    return static_cast<int64_t>(std::clamp(place, 0.0f, last));
  }
};

Histogram read_histogram(const char* op, const Tensor& counts, const Tensor& min_val,
                         const Tensor& max_val) {
  const Histogram histogram{counts.contiguous(), {min_val.item<float>(), max_val.item<float>()}};
  TORCH_CHECK_VALUE(histogram.range.finite() && histogram.range.min <= histogram.range.max,
                    "qtoolkit::", op, ": min_val and max_val must be finite, and min_val no ",
                    "greater, got ", histogram.range.min, " and ", histogram.range.max);
  bool any = false;
  for (const int64_t count : histogram.bins()) {
    TORCH_CHECK_VALUE(count >= 0, "qtoolkit::", op, ": counts must not be negative, got ", count);
    any |= count > 0;
  }
  TORCH_CHECK_VALUE(any, "qtoolkit::", op, ": counts are all zero; there is nothing to quantize");
  return histogram;
}

void write(const TensorPair& result, ValueRange range) {
  *std::get<0>(result).mutable_data_ptr<float>() = range.min;
  *std::get<1>(result).mutable_data_ptr<float>() = range.max;
}

// Whether bins differ in what they stand for at all.
bool divisible(const Histogram& histogram) {
  return histogram.range.min < histogram.range.max && histogram.width() > 0.0f;
}

ValueRange range_of_bins(const Histogram& histogram, kernels::BinRange bins) {
  const float width = histogram.width(), low = histogram.range.min;
  return {low + width * static_cast<float>(bins.first),
          low + width * static_cast<float>(bins.last + 1)};
}

TensorPair range_l2_meta(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                         int64_t levels) {
  check_levels("range_l2", levels);
  return check_histogram("range_l2", counts, min_val, max_val);
}

TensorPair range_l2_cpu(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                        int64_t levels) {
  const TensorPair result = range_l2_meta(counts, min_val, max_val, levels);
  const Histogram histogram = read_histogram("range_l2", counts, min_val, max_val);
  if (!divisible(histogram)) {
    write(result, histogram.range);
    return result;
  }
  const auto bins = kernels::l2_range(histogram.bins(), static_cast<int32_t>(levels));
  write(result, range_of_bins(histogram, bins));
  return result;
}

TensorPair range_kl_meta(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                         int64_t levels) {
  check_levels("range_kl", levels);
  return check_histogram("range_kl", counts, min_val, max_val);
}

TensorPair range_kl_cpu(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                        int64_t levels) {
  const TensorPair result = range_kl_meta(counts, min_val, max_val, levels);
  const Histogram histogram = read_histogram("range_kl", counts, min_val, max_val);
  if (!divisible(histogram)) {
    write(result, histogram.range);
    return result;
  }
  const auto bins =
      kernels::kl_range(histogram.bins(), histogram.zero_bin(), static_cast<int32_t>(levels));
  write(result, range_of_bins(histogram, bins));
  return result;
}

// Ranges whose squared errors are compared, with their scales and zero points; the widest first.
struct Candidates {
  std::vector<ValueRange> ranges;
  std::vector<float> scales;
  std::vector<int32_t> zero_points;

  void add(ValueRange range, CodeRange codes, bool symmetric) {
    const auto [scale, zero_point] = range_to_qparams(range, symmetric, codes.min, codes.max);
    ranges.push_back(range);
    scales.push_back(scale);
    zero_points.push_back(zero_point);
  }
};

float part_of(float bound, int64_t part) {
  return bound * (static_cast<float>(part) / static_cast<float>(kParts));
}

// The range with zero, both ends shortened to the same part of it; a symmetric one to the same
// distance from zero. `apart`: both ends to all pairs of parts, unless symmetric.
Candidates candidates_of(ValueRange range, CodeRange codes, bool symmetric, bool apart) {
  const float low = std::min(range.min, 0.0f), high = std::max(range.max, 0.0f);
  const float most = std::max(-low, high);
  Candidates candidates;
  for (int64_t part = kParts; part > 0; --part) {
    if (symmetric) {
      const float bound = part_of(most, part);
      candidates.add({std::max(low, -bound), std::min(high, bound)}, codes, symmetric);
    } else if (apart && low < 0.0f && high > 0.0f) {
      for (int64_t other = kParts; other > 0; --other) {
        candidates.add({part_of(low, part), part_of(high, other)}, codes, symmetric);
      }
    } else {
      candidates.add({part_of(low, part), part_of(high, part)}, codes, symmetric);
    }
  }
  return candidates;
}

kernels::ScaleErrorsArgs arguments_for(const Candidates& candidates, CodeRange codes,
                                       std::vector<double>& errors) {
  errors.resize(candidates.ranges.size());
  return {.scale = candidates.scales.data(),
          .zero_point = candidates.zero_points.data(),
          .quant_min = codes.min,
          .quant_max = codes.max,
          .errors = errors.data()};
}

// The first of the candidates with the least error.
ValueRange best_of(const Candidates& candidates, const std::vector<double>& errors) {
  const auto best = std::min_element(errors.begin(), errors.end());
  return candidates.ranges[best - errors.begin()];
}

TensorPair range_mse_meta(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                          int64_t quant_min, int64_t quant_max, bool /*symmetric*/) {
  check_quant_range("range_mse", quant_min, quant_max);
  return check_histogram("range_mse", counts, min_val, max_val);
}

TensorPair range_mse_cpu(const Tensor& counts, const Tensor& min_val, const Tensor& max_val,
                         int64_t quant_min, int64_t quant_max, bool symmetric) {
  const TensorPair result =
      range_mse_meta(counts, min_val, max_val, quant_min, quant_max, symmetric);
  const Histogram histogram = read_histogram("range_mse", counts, min_val, max_val);
  if (!divisible(histogram)) {
    write(result, histogram.range);
    return result;
  }
  const CodeRange codes = check_quant_range("range_mse", quant_min, quant_max);
  const auto bins = histogram.bins();
  const std::vector<double> mass(bins.begin(), bins.end());
  std::vector<float> centres(bins.size());
  const float width = histogram.width();
  for (size_t i = 0; i < bins.size(); ++i) {
    centres[i] = histogram.range.min + width * (static_cast<float>(i) + 0.5f);
  }
  // Most values of that bin are zeros where there are any, and zero is a code of every range.
  if (histogram.range.min <= 0.0f && histogram.range.max >= 0.0f) {
    centres[histogram.zero_bin()] = 0.0f;
  }
  const Candidates candidates = candidates_of(histogram.range, codes, symmetric, true);
  std::vector<double> errors;
  kernels::ScaleErrorsArgs args = arguments_for(candidates, codes, errors);
  args.x = centres.data();
  args.mass = mass.data();
  args.size = static_cast<int64_t>(bins.size());
  at::parallel_for(0, static_cast<int64_t>(errors.size()), grain_of(kElementGrain, args.size),
                   [&](int64_t begin, int64_t end) { kernels::scale_errors(args, begin, end); });
  write(result, best_of(candidates, errors));
  return result;
}

TensorPair range_mse_per_channel_meta(const Tensor& x, int64_t ch_axis, int64_t quant_min,
                                      int64_t quant_max, bool /*symmetric*/) {
  constexpr const char* kOp = "range_mse_per_channel";
  check_float(kOp, "x", x);
  TORCH_CHECK_VALUE(x.sym_numel() != 0, "qtoolkit::", kOp, ": x is empty, ", describe(x),
                    "; it has no range");
  check_quant_range(kOp, quant_min, quant_max);
  ch_axis = check_ch_axis(kOp, x, ch_axis);
  return empty_pair(x, x.sym_sizes().slice(ch_axis, 1));
}

// A channel that holds NaN or infinity has the range NaN.
TensorPair range_mse_per_channel_cpu(const Tensor& x, int64_t ch_axis, int64_t quant_min,
                                     int64_t quant_max, bool symmetric) {
  constexpr const char* kOp = "range_mse_per_channel";
  TensorPair result = range_mse_per_channel_meta(x, ch_axis, quant_min, quant_max, symmetric);
  const CodeRange codes = check_quant_range(kOp, quant_min, quant_max);
  ch_axis = check_ch_axis(kOp, x, ch_axis);
  const Tensor rows = x.movedim(ch_axis, 0).to(at::kFloat).contiguous();
  const int64_t channels = rows.size(0), size = rows.numel() / channels;
  const float* values = rows.const_data_ptr<float>();
  float* minimum = std::get<0>(result).mutable_data_ptr<float>();
  float* maximum = std::get<1>(result).mutable_data_ptr<float>();
  at::parallel_for(
      0, channels, grain_of(kElementGrain, size * kParts), [&](int64_t begin, int64_t end) {
        std::vector<double> errors;
        for (int64_t c = begin; c < end; ++c) {
          const float* row = values + c * size;
          const auto [low, high] = std::minmax_element(row, row + size);
          if (!std::all_of(row, row + size, [](float v) { return std::isfinite(v); })) {
            minimum[c] = maximum[c] = std::numeric_limits<float>::quiet_NaN();
            continue;
          }
          const Candidates candidates = candidates_of({*low, *high}, codes, symmetric, false);
          kernels::ScaleErrorsArgs args = arguments_for(candidates, codes, errors);
          args.x = row;
          args.size = size;
          kernels::scale_errors(args, 0, static_cast<int64_t>(errors.size()));
          const ValueRange best = best_of(candidates, errors);
          minimum[c] = best.min;
          maximum[c] = best.max;
        }
      });
  return result;
}

Tensor rebin_histogram_meta(const Tensor& counts, double old_lower, double old_upper, double lower,
                            double upper) {
  constexpr const char* kOp = "rebin_histogram";
  check_dtype(kOp, "counts", counts, at::kLong);
  check_rank(kOp, "counts", counts, 1);
  TORCH_CHECK_VALUE(std::isfinite(lower) && std::isfinite(upper) && lower < upper &&
                        lower <= old_lower && old_lower <= old_upper && old_upper <= upper,
                    "qtoolkit::", kOp, ": [lower, upper] must be finite and include [old_lower, ",
                    "old_upper], got [", lower, ", ", upper, "] and [", old_lower, ", ", old_upper,
                    "]");
  return at::empty_symint(counts.sym_sizes(), counts.options());
}

Tensor rebin_histogram_cpu(const Tensor& counts, double old_lower, double old_upper, double lower,
                           double upper) {
  constexpr int64_t kCuts = 16;
  const Tensor result = rebin_histogram_meta(counts, old_lower, old_upper, lower, upper).zero_();
  const Tensor dense = counts.contiguous();
  const int64_t bins = counts.numel();
  const double width = (old_upper - old_lower) / static_cast<double>(bins * kCuts);
  const double bins_per_unit = static_cast<double>(bins) / (upper - lower);
  const auto* from = dense.const_data_ptr<int64_t>();
  auto* to = result.mutable_data_ptr<int64_t>();
  for (int64_t bin = 0; bin < bins; ++bin) {
    if (from[bin] == 0) continue;
    for (int64_t cut = 0; cut < kCuts; ++cut) {
      // Differences of rounded cut points, so that a bin's parts add up to the bin.
      const int64_t part = from[bin] * (cut + 1) / kCuts - from[bin] * cut / kCuts;
      const double centre = static_cast<double>(bin * kCuts + cut) + 0.5;
      const double place = (old_lower + centre * width - lower) * bins_per_unit;
      to[std::clamp<int64_t>(static_cast<int64_t>(place), 0, bins - 1)] += part;
    }
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("range_l2(Tensor counts, Tensor min_val, Tensor max_val, int levels) -> (Tensor, Tensor)",
        tags);
  m.def("range_kl(Tensor counts, Tensor min_val, Tensor max_val, int levels) -> (Tensor, Tensor)",
        tags);
  m.def(
      "range_mse(Tensor counts, Tensor min_val, Tensor max_val, int quant_min, int quant_max, "
      "bool symmetric) -> (Tensor, Tensor)",
      tags);
  m.def(
      "range_mse_per_channel(Tensor x, int ch_axis, int quant_min, int quant_max, bool symmetric) "
      "-> (Tensor, Tensor)",
      tags);
  m.def(
      "rebin_histogram(Tensor counts, float old_lower, float old_upper, float lower, float upper) "
      "-> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) {
  m.impl("range_l2", range_l2_meta);
  m.impl("range_kl", range_kl_meta);
  m.impl("range_mse", range_mse_meta);
  m.impl("range_mse_per_channel", range_mse_per_channel_meta);
  m.impl("rebin_histogram", rebin_histogram_meta);
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) {
  m.impl("range_l2", range_l2_cpu);
  m.impl("range_kl", range_kl_cpu);
  m.impl("range_mse", range_mse_cpu);
  m.impl("range_mse_per_channel", range_mse_per_channel_cpu);
  m.impl("rebin_histogram", rebin_histogram_cpu);
}

}  // namespace qtoolkit::ops
