#include "ops/weight_cache.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <unordered_map>
#include <vector>

namespace qtoolkit::ops {
namespace {

using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

// The settings that one packed weight is remembered with at once; the oldest goes first. They take
// microseconds to compute again.
constexpr size_t kMostTerms = 8;
// The packed weights made from one storage may cover it this many times; the oldest goes first.
constexpr int64_t kMostCover = 4;
// Calls between two looks for dead weights. A look takes some nanoseconds a weight.
constexpr int64_t kSweepEvery = 64;

// A sum, weighted by place, of 64 words spread over the dense weight's bytes, or of all of them if
// there are fewer.
uint64_t sample(const Tensor& weight) {
  constexpr int64_t kWords = 64;
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;
  const int64_t bytes = weight.numel();
  const auto* data = static_cast<const char*>(weight.const_data_ptr());
  const int64_t step = std::max<int64_t>(sizeof(uint64_t), bytes / kWords);
  uint64_t sum = 0;
  uint64_t factor = kOdd;
  int64_t at = 0;
  for (; at + static_cast<int64_t>(sizeof(uint64_t)) <= bytes; at += step, factor += 2 * kOdd) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, sizeof(word));
    sum += word * factor;
  }
  if (at < bytes) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, static_cast<size_t>(bytes - at));
    sum += word * factor;
  }
  return sum;
}

// Where a weight lies and how the kernel sees it.
struct Place {
  const void* data;
  at::DimVector strides;
  int64_t out_channels, in_channels, kernel_height, kernel_width, groups, runs;
  bool depthwise;
  kernels::Conv2dLayout layout;
  std::optional<TransposedPart> transposed;

  explicit Place(const WeightRequest& r)
      : data(r.weight.const_data_ptr()),
        strides(r.weight.strides()),
        out_channels(r.shape.out_channels),
        in_channels(r.shape.in_channels),
        kernel_height(r.shape.kernel_height),
        kernel_width(r.shape.kernel_width),
        groups(r.shape.groups),
        runs(r.shape.runs_per_row()),
        depthwise(r.depthwise),
        layout(r.layout),
        transposed(r.transposed) {}

  bool operator==(const Place&) const = default;
};

// What the weight holds.
struct Contents {
  int64_t version;
  uint64_t sample;

  explicit Contents(const Tensor& weight)
      : version(weight.is_inference() ? 0 : weight._version()), sample(ops::sample(weight)) {}

  bool operator==(const Contents&) const = default;
};

template <class T>
bool same_bytes(std::span<const T> a, std::span<const T> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

template <class T>
std::span<const T> values_of(const Tensor* tensor) {
  if (tensor == nullptr) return {};
  return {tensor->const_data_ptr<T>(), static_cast<size_t>(tensor->numel())};
}

struct Settings {
  float x_scale, y_scale;
  int32_t x_zero_point;
  bool has_bias;
  std::vector<int32_t> bias;
  std::vector<float> weight_scale;

  explicit Settings(const WeightRequest& r)
      : x_scale(r.x_scale),
        y_scale(r.y_scale),
        x_zero_point(r.x_zero_point),
        has_bias(r.bias != nullptr) {
    const auto scales = values_of<float>(&r.weight_scale);
    const auto biases = values_of<int32_t>(r.bias);
    weight_scale.assign(scales.begin(), scales.end());
    bias.assign(biases.begin(), biases.end());
  }

  bool are(const WeightRequest& r) const {
    return x_scale == r.x_scale && y_scale == r.y_scale && x_zero_point == r.x_zero_point &&
           has_bias == (r.bias != nullptr) &&
           same_bytes<float>(weight_scale, values_of<float>(&r.weight_scale)) &&
           same_bytes<int32_t>(bias, values_of<int32_t>(r.bias));
  }
};

struct RememberedTerms {
  Settings settings;
  std::shared_ptr<const ChannelTerms> terms;
};

struct Remembered {
  Place place;
  Contents contents;
  int64_t numel;
  std::shared_ptr<const PackedWeight> weight;
  std::vector<RememberedTerms> terms;

  std::shared_ptr<const ChannelTerms> find(const WeightRequest& request) const {
    for (const RememberedTerms& known : terms) {
      if (known.settings.are(request)) return known.terms;
    }
    return nullptr;
  }
};

// The weights that lie in one storage. The weak pointer tells when the storage is gone, and until
// it is dropped keeps the address from being given to another.
struct Entry {
  WeakStorage storage;
  std::vector<Remembered> remembered;

  Remembered* find(const Place& place, const Contents& contents) {
    const auto found = std::ranges::find_if(remembered, [&](const Remembered& r) {
      return r.contents == contents && r.place == place;
    });
    return found == remembered.end() ? nullptr : &*found;
  }
};

// The weight that a request is for.
struct Weight {
  const WeightRequest& request;
  Place place;
  Contents contents;

  explicit Weight(const WeightRequest& request)
      : request(request), place(request), contents(request.weight) {}
};

class Cache {
 public:
  PackedHandle find(const Weight& weight) {
    const std::shared_lock lock(mutex_);
    const auto entry = entries_.find(storage_of(weight));
    if (entry == entries_.end()) return {};
    const Remembered* const known = entry->second.find(weight.place, weight.contents);
    if (known == nullptr) return {};
    return {known->weight, known->find(weight.request)};
  }

  // Remembers what was made; returns what another thread has remembered meanwhile, if it has.
  PackedHandle insert(const Weight& weight, PackedHandle made) {
    const std::unique_lock lock(mutex_);
    Entry& entry = entries_
                       .try_emplace(storage_of(weight),
                                    Entry{weight.request.weight.storage().getWeakStorageImpl(), {}})
                       .first->second;
    Remembered* known = entry.find(weight.place, weight.contents);
    if (known == nullptr) {
      sweep();
      known = add(entry, weight, std::move(made.weight));
    }
    if (auto terms = known->find(weight.request)) return {known->weight, std::move(terms)};
    if (known->terms.size() == kMostTerms) known->terms.erase(known->terms.begin());
    known->terms.push_back({Settings(weight.request), made.terms});
    return {known->weight, std::move(made.terms)};
  }

  void count_call() {
    if (++calls_ < next_sweep_.load(std::memory_order_relaxed)) return;
    const std::unique_lock lock(mutex_);
    if (calls_ >= next_sweep_) sweep();
  }

  void count_packing() { ++packings_; }

  WeightCacheState state() {
    const std::shared_lock lock(mutex_);
    WeightCacheState state{.packings = packings_};
    for (const auto& [address, entry] : entries_) {
      for (const Remembered& r : entry.remembered) {
        ++state.packed_weights;
        state.packed_bytes += r.weight->size;
        state.channel_terms += static_cast<int64_t>(r.terms.size());
      }
    }
    return state;
  }

 private:
  static const c10::StorageImpl* storage_of(const Weight& weight) {
    return weight.request.weight.storage().unsafeGetStorageImpl();
  }

  // The rest is called under the unique lock.
  void sweep() {
    std::erase_if(entries_, [](const auto& item) { return item.second.storage.expired(); });
    next_sweep_ = calls_ + std::max<int64_t>(kSweepEvery, std::ssize(entries_));
  }

  static Remembered* add(Entry& entry, const Weight& weight,
                         std::shared_ptr<const PackedWeight> packed) {
    // What was packed from earlier contents of the weight will not be asked for again.
    std::erase_if(entry.remembered, [&](const Remembered& r) { return r.place == weight.place; });
    const Tensor& tensor = packed->canonical.defined() ? packed->canonical : weight.request.weight;
    entry.remembered.push_back({.place = weight.place,
                                .contents = weight.contents,
                                .numel = tensor.numel(),
                                .weight = std::move(packed),
                                .terms = {}});
    int64_t covered = 0;
    for (const Remembered& r : entry.remembered) covered += r.numel;
    const auto most = kMostCover * static_cast<int64_t>(weight.request.weight.storage().nbytes());
    auto first = entry.remembered.begin();
    for (; covered > most; ++first) covered -= first->numel;
    entry.remembered.erase(entry.remembered.begin(), first);
    return &entry.remembered.back();
  }

  std::shared_mutex mutex_;
  std::unordered_map<const c10::StorageImpl*, Entry> entries_;
  std::atomic<int64_t> calls_{0};
  std::atomic<int64_t> next_sweep_{kSweepEvery};
  std::atomic<int64_t> packings_{0};
};

// Never destroyed: tensors may outlive the library's static objects.
Cache& cache() {
  static auto* const instance = new Cache;
  return *instance;
}

}  // namespace

PackedHandle packed_weight(const WeightRequest& request) {
  Cache& known = cache();
  known.count_call();
  PackedHandle handle;
  const auto complete = [&] {
    if (handle.weight == nullptr) {
      handle.weight = pack_weight(request);
      known.count_packing();
    }
    handle.terms = channel_terms(request, *handle.weight);
  };
  if (!request.weight.is_non_overlapping_and_dense()) {
    complete();
    return handle;
  }
  const Weight weight(request);
  handle = known.find(weight);
  if (handle.terms != nullptr) return handle;
  complete();
  return known.insert(weight, std::move(handle));
}

WeightCacheState weight_cache_state() { return cache().state(); }

}  // namespace qtoolkit::ops
