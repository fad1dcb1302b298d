// The range of a histogram that is worth quantizing.
#pragma once

#include <cstdint>
#include <span>

namespace qtoolkit::kernels {

// From the first to the last bin, both included.
struct BinRange {
  int32_t first = 0, last = 0;
  bool operator==(const BinRange&) const = default;
};

// The range with the least squared error by greedy search: 1e-5 of the values at a time is cut from
// the end that gets more bins shorter by it, until the error of `levels` cells (cell_errors) rises.
// It is the search of caffe2's NormMinimization and of torch.ao's HistogramObserver, but that the
// whole range is kept where it is the better one. counts has from 1 to 2^24 bins, not all zero.
BinRange l2_range(std::span<const int64_t> counts, int32_t levels);

// The range around zero_bin, [zero_bin - h, zero_bin + h] within the histogram, whose
// Kullback-Leibler divergence from the histogram is the least, the narrowest of several. Ranges of
// at least `levels` bins are tried, and the whole one. P is the range's counts, with what lies
// outside added to the outermost of its bins that are not empty; Q cuts the range into `levels`
// groups, n bins of it from bin n * g / levels on, and spreads each group's count (without what
// lies outside) evenly over its bins that are not empty. Zero is a code of every range, so zero_bin
// counts as its greater neighbour at most.
// Source: Migacz, "8-bit inference with TensorRT", 2017.
BinRange kl_range(std::span<const int64_t> counts, int64_t zero_bin, int32_t levels);

}  // namespace qtoolkit::kernels
