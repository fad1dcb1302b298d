#include "ops/weight_cache.h"

#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <unordered_map>

namespace qtoolkit::ops {
namespace {

// The settings that one weight is remembered with at once; the oldest goes first.
constexpr size_t kMostPerWeight = 4;

// A sum, weighted by place, of 64 words spread over the weight's bytes, or of all of them if there
// are fewer.
uint64_t sample(const Tensor& weight) {
  if (!weight.is_non_overlapping_and_dense()) return 0;
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

struct Settings {
  int64_t version;
  const void* data;
  uint64_t sample;
  int64_t out_channels, in_channels, kernel_height, kernel_width, groups, runs;
  bool depthwise, contiguous;
  float x_scale, y_scale;
  int32_t x_zero_point;

  explicit Settings(const WeightRequest& r)
      : version(r.weight.is_inference() ? 0 : r.weight._version()),
        data(r.weight.const_data_ptr()),
        sample(ops::sample(r.weight)),
        out_channels(r.shape.out_channels),
        in_channels(r.shape.in_channels),
        kernel_height(r.shape.kernel_height),
        kernel_width(r.shape.kernel_width),
        groups(r.shape.groups),
        runs(r.shape.runs_per_row()),
        depthwise(r.depthwise),
        contiguous(r.weight.is_contiguous()),
        x_scale(r.x_scale),
        y_scale(r.y_scale),
        x_zero_point(r.x_zero_point) {}

  bool operator==(const Settings&) const = default;
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

struct Remembered {
  Settings settings;
  bool has_bias;
  std::vector<int32_t> bias;
  std::vector<float> weight_scale;
  std::shared_ptr<const PackedWeight> packed;

  Remembered(const WeightRequest& request, const Settings& settings,
             std::shared_ptr<const PackedWeight> packed)
      : settings(settings), has_bias(request.bias != nullptr), packed(std::move(packed)) {
    const auto scales = values_of<float>(&request.weight_scale);
    const auto biases = values_of<int32_t>(request.bias);
    weight_scale.assign(scales.begin(), scales.end());
    bias.assign(biases.begin(), biases.end());
  }

  bool holds(const WeightRequest& request, const Settings& wanted) const {
    return settings == wanted && has_bias == (request.bias != nullptr) &&
           same_bytes<float>(weight_scale, values_of<float>(&request.weight_scale)) &&
           same_bytes<int32_t>(bias, values_of<int32_t>(request.bias));
  }
};

// The weak pointer tells when the weight is gone, and until it is dropped keeps the address from
// being given to another tensor.
struct Entry {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> weight;
  std::vector<Remembered> remembered;
};

struct Cache {
  std::shared_mutex mutex;
  std::unordered_map<const c10::TensorImpl*, Entry> entries;
};

// Never destroyed: tensors may outlive the library's static objects.
Cache& cache() {
  static auto* const instance = new Cache;
  return *instance;
}

int8_t* allocate(int64_t bytes) {
  constexpr size_t kAlignment = 64;
  const size_t size = (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
  void* const result = std::aligned_alloc(kAlignment, std::max(size, kAlignment));
  if (result == nullptr) throw std::bad_alloc();
  return static_cast<int8_t*>(result);
}

std::shared_ptr<const PackedWeight> pack(const WeightRequest& request) {
  const kernels::Conv2dShape& shape = request.shape;
  const auto scales = values_of<float>(&request.weight_scale);
  const auto biases = values_of<int32_t>(request.bias);
  check_scales(request.op, "weight_scale", scales);

  auto result = std::make_shared<PackedWeight>();
  Tensor weight = request.weight;
  if (!weight.is_contiguous()) weight = result->canonical = weight.contiguous();
  const auto* w = weight.const_data_ptr<int8_t>();
  if (request.depthwise) {
    result->packed.reset(allocate(shape.kernel_height * shape.kernel_width * shape.groups));
    kernels::pack_conv2d_depthwise_weight(shape, w, result->packed.get());
  } else {
    result->packed.reset(allocate(shape.packed_bytes()));
    kernels::pack_conv2d_weight(shape, w, result->packed.get());
  }

  const int64_t channels = shape.groups * shape.out_channels;
  const int64_t taps = shape.in_channels * shape.kernel_height * shape.kernel_width;
  const int64_t group_stride =
      request.depthwise ? 1 : shape.blocks_per_group() * kernels::kChannelBlock;
  const auto length = static_cast<size_t>(shape.groups * group_stride);
  result->offset.assign(length, 0);
  result->multiplier.assign(length, 0.0f);
  for (int64_t c = 0; c < channels; ++c) {
    int64_t sum = 0;
    for (int64_t k = 0; k < taps; ++k) sum += w[c * taps + k];
    const int64_t bias = biases.empty() ? 0 : biases[static_cast<size_t>(c)];
    const double scale = scales[scales.size() == 1 ? 0 : static_cast<size_t>(c)];
    const auto at =
        static_cast<size_t>(c / shape.out_channels * group_stride + c % shape.out_channels);
    // The accumulator wraps, and so may the offset: their sum fits.
    result->offset[at] = static_cast<int32_t>(bias - request.x_zero_point * sum);
    result->multiplier[at] =
        multiplier(request.op, static_cast<double>(request.x_scale) * scale, request.y_scale);
  }
  return result;
}

void insert(Cache& cache, const WeightRequest& request, const Settings& settings,
            const std::shared_ptr<const PackedWeight>& packed) {
  const std::unique_lock lock(cache.mutex);
  std::erase_if(cache.entries, [](const auto& item) { return item.second.weight.expired(); });
  const auto& impl = request.weight.getIntrusivePtr();
  auto& remembered = cache.entries.try_emplace(impl.get(), Entry{c10::weak_intrusive_ptr(impl), {}})
                         .first->second.remembered;
  // What was packed from earlier contents of the weight will not be asked for again.
  const auto stale = std::ranges::remove_if(remembered, [&](const Remembered& r) {
    return r.settings.version != settings.version || r.settings.data != settings.data ||
           r.settings.sample != settings.sample;
  });
  remembered.erase(stale.begin(), stale.end());
  if (remembered.size() == kMostPerWeight) remembered.erase(remembered.begin());
  remembered.emplace_back(request, settings, packed);
}

}  // namespace

std::shared_ptr<const PackedWeight> packed_weight(const WeightRequest& request) {
  Cache& known = cache();
  const Settings settings(request);
  {
    const std::shared_lock lock(known.mutex);
    const auto found = known.entries.find(request.weight.unsafeGetTensorImpl());
    if (found != known.entries.end()) {
      for (const Remembered& remembered : found->second.remembered) {
        if (remembered.holds(request, settings)) return remembered.packed;
      }
    }
  }
  std::shared_ptr<const PackedWeight> packed = pack(request);
  insert(known, request, settings, packed);
  return packed;
}

}  // namespace qtoolkit::ops
