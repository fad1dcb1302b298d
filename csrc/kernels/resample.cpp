#include "kernels/resample.h"

#include <algorithm>
#include <cmath>

namespace qtoolkit::kernels {
namespace {

// Input positions for one output position.
float step_of(int64_t in_size, int64_t out_size, std::optional<double> factor) {
  if (factor) return static_cast<float>(1.0 / *factor);
  return static_cast<float>(in_size) / static_cast<float>(out_size);
}

}  // namespace

std::vector<int64_t> nearest_sources(int64_t in_size, int64_t out_size,
                                     std::optional<double> factor, bool exact) {
  std::vector<int64_t> sources;
  const float step = step_of(in_size, out_size, factor);
  for (int64_t i = 0; i < out_size; ++i) {
    int64_t source = 0;
    if (exact) {
      // PyTorch adds and multiplies in double.
      const double place = (static_cast<double>(i) + 0.5) * static_cast<double>(step);
      source = static_cast<int64_t>(std::floor(static_cast<float>(place)));
    } else if (out_size == in_size || out_size == 2 * in_size) {
      // Whatever the factor, as PyTorch has it for channels_last (for others it depends on sizes).
      source = i / (out_size / in_size);
    } else {
      source = static_cast<int64_t>(std::floor(static_cast<float>(i) * step));
    }
    sources.push_back(std::min(source, in_size - 1));
  }
  return sources;
}

std::vector<LinearSource> linear_sources(int64_t in_size, int64_t out_size,
                                         std::optional<double> factor, bool align_corners) {
  std::vector<LinearSource> sources;
  float step = step_of(in_size, out_size, factor);
  if (align_corners) {
    step = out_size > 1 ? static_cast<float>(in_size - 1) / static_cast<float>(out_size - 1) : 0.0f;
  }
  for (int64_t i = 0; i < out_size; ++i) {
    LinearSource source{.first = i, .second = i};
    if (out_size != in_size) {
      const float index = static_cast<float>(i);
      const float place =
          align_corners ? step * index : std::max(step * (index + 0.5f) - 0.5f, 0.0f);
      source.first = std::min(static_cast<int64_t>(std::floor(place)), in_size - 1);
      source.second = std::min(source.first + 1, in_size - 1);
      source.second_weight = std::clamp(place - static_cast<float>(source.first), 0.0f, 1.0f);
      source.first_weight = 1.0f - source.second_weight;
    }
    sources.push_back(source);
  }
  return sources;
}

std::vector<int64_t> padded_sources(int64_t in_size, int64_t before, int64_t after,
                                    Padding padding) {
  std::vector<int64_t> sources;
  for (int64_t i = -before; i < in_size + after; ++i) {
    int64_t source = i;
    if (i < 0 || i >= in_size) {
      switch (padding) {
        case Padding::constant:
          source = -1;
          break;
        case Padding::reflect:
          source = i < 0 ? -i : 2 * (in_size - 1) - i;
          break;
        case Padding::replicate:
          source = i < 0 ? 0 : in_size - 1;
          break;
        case Padding::circular:
          source = i < 0 ? i + in_size : i - in_size;
          break;
      }
    }
    sources.push_back(source);
  }
  return sources;
}

}  // namespace qtoolkit::kernels
