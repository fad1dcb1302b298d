#include "problem.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <new>
#include <random>

namespace qtoolkit::benchmarks {
namespace {

kernels::Conv2dShape shape_of(const Layer& layer) {
  kernels::Conv2dShape shape;
  shape.out_height = shape.out_width = layer.size;
  shape.groups = layer.depthwise() ? layer.in : 1;
  shape.in_channels = layer.depthwise() ? 1 : layer.in;
  shape.out_channels = layer.depthwise() ? 1 : layer.out;
  shape.kernel_height = shape.kernel_width = layer.kernel;
  shape.stride_height = shape.stride_width = layer.stride;
  return shape;
}

constexpr std::align_val_t kPage{size_t{2} << 20};

}  // namespace

void* allocate_pages(size_t bytes) {
  void* const memory = ::operator new(bytes, kPage);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Slower, but not wrong, where it fails.
  (void)madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}
void free_pages(void* memory) { ::operator delete(memory, kPage); }

Problem::Problem(const Layer& layer, bool cold_weights) : depthwise_(layer.depthwise()) {
  kernels::Conv2dShape& s = args_.shape;
  s = shape_of(layer);
  std::mt19937 random(1);
  const auto fill = [&](auto& buffer, int64_t size) {
    buffer.resize(size);
    for (auto& code : buffer) code = static_cast<std::decay_t<decltype(code)>>(random());
  };

  const int64_t side = (layer.size - 1) * layer.stride + layer.kernel;
  fill(x_, side * side * layer.in + kernels::kOverread);
  args_.x = x_.data();
  args_.x_pixel_stride = layer.in;
  args_.x_row_stride = side * layer.in;
  args_.x_image_stride = side * args_.x_row_stride;

  // A border of one pixel, as a 3 x 3 kernel reads it.
  args_.y_pixel_stride = layer.out;
  args_.y_row_stride = (layer.size + 2) * layer.out;
  args_.y_image_stride = (layer.size + 2) * args_.y_row_stride;
  const int64_t first = args_.y_row_stride + args_.y_pixel_stride;
  const bool float_output = layer.kind == Kind::linear;
  y_.resize(args_.y_image_stride * (float_output ? sizeof(float) : 1));
  args_.y = y_.data() + first;
  args_.output = float_output ? kernels::Conv2dOutput::float32 : kernels::Conv2dOutput::codes;
  args_.zero_point = layer.relu() ? 0 : 117;
  if (layer.residual()) {
    fill(residual_, args_.y_image_stride);
    args_.residual = residual_.data() + first;
    args_.residual_image_stride = args_.y_image_stride;
    args_.residual_row_stride = args_.y_row_stride;
    args_.residual_pixel_stride = args_.y_pixel_stride;
    args_.residual_zero_point = layer.relu() ? 0 : 117;
    args_.residual_multiplier = 0.3f;
  }

  fill_weight(layer.out, s.in_channels * layer.kernel * layer.kernel);
  args_.weight = weight_.data();
  offset_.assign(s.padded_channels(), 7);
  args_.offset = offset_.data();
  multiplier_.assign(s.padded_channels(), 1e-3f);
  args_.multiplier = multiplier_.data();
  args_.layout = kernels::conv2d_layout(s);
  const int64_t bytes = depthwise_ ? std::ssize(weight_)
                                   : kernels::conv2d_packed_bytes(args_.layout, s, weight_.data());
  copy_bytes_ = (bytes + 63) / 64 * 64;
  copies_ = cold_weights ? 1 + kColdBytes / copy_bytes_ : 1;
  packed_.resize(copies_ * copy_bytes_);
  for (int64_t copy = 0; copy < copies_; ++copy) {
    int8_t* const packed = packed_.data() + copy * copy_bytes_;
    if (depthwise_) {
      kernels::pack_conv2d_depthwise_weight(s, weight_.data(), packed);
    } else {
      kernels::pack_conv2d_weight(args_.layout, s, weight_.data(), packed);
    }
  }
}

void Problem::fill_weight(int64_t channels, int64_t reduction) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  weight_.resize(channels * reduction);
  std::vector<float> values(reduction);
  for (int64_t channel = 0; channel < channels; ++channel) {
    float largest = 0;
    for (float& value : values) largest = std::max(largest, std::fabs(value = normal(random)));
    for (int64_t i = 0; i < reduction; ++i) {
      weight_[channel * reduction + i] = static_cast<int8_t>(std::lrint(values[i] / largest * 127));
    }
  }
}

void Problem::call() {
  args_.packed = packed_.data() + next_ * copy_bytes_;
  next_ = next_ + 1 == copies_ ? 0 : next_ + 1;
  if (depthwise_) {
    kernels::conv2d_depthwise(args_, 0, args_.shape.out_height);
  } else {
    kernels::conv2d(args_, 0, kernels::conv2d_units(args_.shape));
  }
}

}  // namespace qtoolkit::benchmarks
