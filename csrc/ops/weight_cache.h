// Packed weights are derived from plain tensors and kept in the process, so that operators stay
// functions of plain tensors.
#pragma once

#include <cstdint>
#include <memory>

#include "ops/packed_weight.h"

namespace qtoolkit::ops {

struct PackedHandle {
  std::shared_ptr<const PackedWeight> weight;
  std::shared_ptr<const ChannelTerms> terms;
};

// Packs, or returns what was packed before for an equal request.
//
// A packed weight is shared by all requests for the same bytes in the same shape: a tensor, its
// views and its detach(). It holds while the weight's version (autograd's count of in-place
// changes), its place in memory and a sample of its bytes are the same: the sample serves tensors
// that count no versions (inference tensors) and changes that are not counted (`.data`, numpy),
// where a change of a few elements can go unseen. Scales and bias are compared by value. A weight
// whose elements are not dense in memory is packed at every call.
//
// What was packed from a weight that has died is released by the next call that packs, or else
// after as many calls as weights are remembered, 64 at least.
PackedHandle packed_weight(const WeightRequest& request);

// What is kept now, and how often a weight was packed; for tests.
struct WeightCacheState {
  int64_t packed_weights = 0;
  int64_t packed_bytes = 0;
  int64_t channel_terms = 0;
  int64_t packings = 0;
};
WeightCacheState weight_cache_state();

}  // namespace qtoolkit::ops
