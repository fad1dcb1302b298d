#include "kernels/range_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/range_errors.h"

namespace qtoolkit::kernels {
namespace {

// Share of all values by which a step of the search shortens one end of the range.
constexpr double kStep = 1e-5;

std::vector<double> running_sums(std::span<const double> terms) {
  std::vector<double> sums(terms.size() + 1, 0.0);
  std::partial_sum(terms.begin(), terms.end(), sums.begin() + 1);
  return sums;
}

// The ranges that the L2 search tries in turn, which do not depend on their errors.
class ShrinkingRanges {
 public:
  explicit ShrinkingRanges(std::span<const double> mass)
      : cumulative_(mass.size()), last_(static_cast<int64_t>(mass.size()) - 1) {
    std::partial_sum(mass.begin(), mass.end(), cumulative_.begin());
  }

  // False when there are no more.
  bool next(BinRange& range) {
    const double total = cumulative_.back();
    const auto place = [&](int64_t bin) { return cumulative_.begin() + bin; };
    while (lower_ < upper_) {
      const double next_lower = lower_ + kStep, next_upper = upper_ - kStep;
      const int64_t left =
          std::lower_bound(place(first_), place(last_), next_lower * total) - place(0);
      const int64_t right =
          std::upper_bound(place(first_ + 1), place(last_ + 1), next_upper * total) - place(0) - 1;
      if (left == first_ && right == last_) {
        // Both stay until the upper end has come down to the last bin's share: all at once.
        const auto steps = static_cast<int64_t>((upper_ - cumulative_[last_] / total) / kStep);
        upper_ -= static_cast<double>(std::max<int64_t>(steps, 1)) * kStep;
        continue;
      }
      if (left - first_ > last_ - right) {
        lower_ = next_lower;
        first_ = left;
      } else {
        upper_ = next_upper;
        last_ = right;
      }
      range = {static_cast<int32_t>(first_), static_cast<int32_t>(last_)};
      return true;
    }
    return false;
  }

 private:
  std::vector<double> cumulative_;
  int64_t first_ = 0, last_;
  double lower_ = 0.0, upper_ = 1.0;
};

// The squared errors of several ranges of one histogram.
class RangeErrors {
 public:
  RangeErrors(std::span<const double> mass, int32_t levels) : mass_(mass), levels_(levels) {}

  const std::vector<double>& of(std::span<const BinRange> ranges) {
    first_.resize(ranges.size());
    last_.resize(ranges.size());
    errors_.resize(ranges.size());
    for (size_t i = 0; i < ranges.size(); ++i) {
      first_[i] = ranges[i].first;
      last_[i] = ranges[i].last;
    }
    cell_errors({.mass = mass_.data(),
                 .bins = static_cast<int64_t>(mass_.size()),
                 .first = first_.data(),
                 .last = last_.data(),
                 .levels = levels_,
                 .errors = errors_.data()},
                0, static_cast<int64_t>(ranges.size()));
    return errors_;
  }

 private:
  std::span<const double> mass_;
  int32_t levels_;
  std::vector<int32_t> first_, last_;
  std::vector<double> errors_;
};

double x_log_x(double x) { return x > 0.0 ? x * std::log(x) : 0.0; }

// Kullback-Leibler divergences of ranges of one histogram, from running sums: the work for one
// range grows with the levels and not with its bins.
class Divergences {
 public:
  Divergences(std::vector<double> mass, int32_t levels) : mass_(std::move(mass)), levels_(levels) {
    std::vector<double> occupied, logarithms;
    for (const double count : mass_) {
      occupied.push_back(count > 0.0 ? 1.0 : 0.0);
      logarithms.push_back(x_log_x(count));
    }
    counts_ = running_sums(mass_);
    occupied_ = running_sums(occupied);
    logarithms_ = running_sums(logarithms);
    const auto bins = static_cast<int64_t>(mass_.size());
    next_.assign(mass_.size(), bins);
    previous_.assign(mass_.size(), -1);
    for (int64_t i = 0, last = -1; i < bins; ++i) previous_[i] = last = mass_[i] > 0.0 ? i : last;
    for (int64_t i = bins - 1, next = bins; i >= 0; --i)
      next_[i] = next = mass_[i] > 0.0 ? i : next;
  }

  // KL(P || Q) of the counts, which are normalized: sum P log P - sum P log Q. Infinite where the
  // range holds nothing.
  double of(BinRange range) const {
    const int64_t begin = range.first, end = int64_t{range.last} + 1;
    const double inside = counts_[end] - counts_[begin], all = counts_.back();
    if (inside == 0.0) return std::numeric_limits<double>::infinity();
    const double below = counts_[begin], above = all - counts_[end];
    const int64_t first = next_[begin], last = previous_[end - 1];
    double entropy = logarithms_[end] - logarithms_[begin];
    if (first == last) {
      entropy = x_log_x(all);
    } else {
      entropy += x_log_x(mass_[first] + below) - x_log_x(mass_[first]);
      entropy += x_log_x(mass_[last] + above) - x_log_x(mass_[last]);
    }
    double cross = 0.0;
    for (int64_t g = 0; g < levels_; ++g) {
      const int64_t from = begin + (end - begin) * g / levels_;
      const int64_t to = begin + (end - begin) * (g + 1) / levels_;
      double count = counts_[to] - counts_[from];
      if (count == 0.0) continue;
      const double spread = std::log(count / (occupied_[to] - occupied_[from]));
      if (from <= first && first < to) count += below;
      if (from <= last && last < to) count += above;
      cross += count * spread;
    }
    return (entropy - cross) / all + std::log(inside / all);
  }

 private:
  std::vector<double> mass_;
  std::vector<double> counts_, occupied_, logarithms_;  // running sums
  std::vector<int64_t> next_, previous_;  // the nearest bin that is not empty, from each on
  int64_t levels_;
};

}  // namespace

BinRange l2_range(std::span<const int64_t> counts, int32_t levels) {
  // Few candidates at first, as most searches end early.
  constexpr size_t kFirstChunk = 16, kLargestChunk = 128;
  const std::vector<double> mass(counts.begin(), counts.end());
  ShrinkingRanges candidates(mass);
  RangeErrors errors(mass, levels);
  const BinRange whole = {0, static_cast<int32_t>(counts.size()) - 1};
  BinRange best = whole;
  // The first cut is not held against the whole range: where a few values lie far out, one cut may
  // raise the error and the next ones lower it.
  double lowest = std::numeric_limits<double>::infinity();
  std::vector<BinRange> chunk;
  bool rising = false;
  for (size_t size = kFirstChunk; !rising; size = std::min(2 * size, kLargestChunk)) {
    chunk.clear();
    for (BinRange range; chunk.size() < size && candidates.next(range);) chunk.push_back(range);
    if (chunk.empty()) break;
    const std::vector<double>& found = errors.of(chunk);
    for (size_t i = 0; i < chunk.size() && !rising; ++i) {
      rising = found[i] > lowest;
      if (rising) break;
      best = chunk[i];
      lowest = found[i];
    }
  }
  return lowest < errors.of({&whole, 1})[0] ? best : whole;
}

BinRange kl_range(std::span<const int64_t> counts, int64_t zero_bin, int32_t levels) {
  const auto bins = static_cast<int64_t>(counts.size());
  std::vector<double> mass(counts.begin(), counts.end());
  const double before = zero_bin > 0 ? mass[zero_bin - 1] : 0.0;
  const double after = zero_bin + 1 < bins ? mass[zero_bin + 1] : 0.0;
  mass[zero_bin] = std::min(mass[zero_bin], std::max(before, after));
  const Divergences divergences(std::move(mass), levels);
  const BinRange whole = {0, static_cast<int32_t>(bins) - 1};
  BinRange best = whole;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t half = 0; half < bins; ++half) {
    const BinRange range = {static_cast<int32_t>(std::max<int64_t>(0, zero_bin - half)),
                            static_cast<int32_t>(std::min(bins - 1, zero_bin + half))};
    if (range.last - range.first + 1 < levels && range != whole) continue;
    const double divergence = divergences.of(range);
    if (divergence < least) {
      least = divergence;
      best = range;
    }
    if (range == whole) break;
  }
  return best;
}

}  // namespace qtoolkit::kernels
