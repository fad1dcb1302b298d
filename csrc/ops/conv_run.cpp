#include "ops/conv_run.h"

#include <algorithm>
#include <cstring>

#include "ops/aligned_buffer.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

using kernels::Conv2dArgs;

// A buffer for one call's images. Small ones belong to the calling thread, which keeps one.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    // Enough for 64 channels of 350 x 350. Filling a new buffer measured no slower than a kept one
    // up to 16 MB, where malloc hands out the same pages again; at 41 MB new pages cost a 3x3
    // convolution of 64 channels up to 15 ms of 111.
    constexpr int64_t kMostKept = int64_t{8} << 20;
    thread_local AlignedBuffer<uint8_t> kept;
    thread_local int64_t kept_bytes = 0;
    if (bytes > kMostKept) {
      own_ = aligned_buffer<uint8_t>(bytes);
      data_ = own_.get();
      return;
    }
    if (kept_bytes < bytes) {
      kept_bytes = 0;
      kept = aligned_buffer<uint8_t>(bytes);
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }

  uint8_t* data() const { return data_; }

 private:
  AlignedBuffer<uint8_t> own_;
  uint8_t* data_;
};

// The images as the kernel reads them: where they lie, or a copy with a border.
class Source {
 public:
  Source(const ConvImages& images, const kernels::Conv2dShape& shape, bool depthwise)
      : images_(images),
        height_(images.height + 2 * images.padding_height),
        row_bytes_((images.width + 2 * images.padding_width) * images.channels),
        copies_(images.padding_height > 0 || images.padding_width > 0 || images.is_signed ||
                images.planar || (!depthwise && shape.overreads())) {}

  bool copies() const { return copies_; }
  int64_t height() const { return height_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t image_bytes() const { return height_ * row_bytes_; }
  int64_t copy_bytes(int64_t images) const { return images * image_bytes() + kernels::kOverread; }
  const uint8_t* image(int64_t n) const {
    return images_.x + n * images_.height * images_.width * images_.channels;
  }

  // Rows [begin, end) of the copy of image n and those after it, borders included.
  void copy_rows(int64_t n, uint8_t* copy, int64_t begin, int64_t end) const {
    const int64_t side = images_.padding_width * images_.channels;
    const int64_t inner = images_.width * images_.channels;
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* const to = copy + row * row_bytes_;
      const int64_t from_row = row % height_ - images_.padding_height;
      if (from_row < 0 || from_row >= images_.height) {
        std::memset(to, images_.border, static_cast<size_t>(row_bytes_));
        continue;
      }
      std::memset(to, images_.border, static_cast<size_t>(side));
      copy_codes(n + row / height_, from_row, to + side);
      std::memset(to + side + inner, images_.border, static_cast<size_t>(side));
    }
  }

 private:
  void copy_codes(int64_t n, int64_t row, uint8_t* to) const {
    const int64_t inner = images_.width * images_.channels;
    const uint8_t flip = images_.is_signed ? 0x80 : 0;
    if (images_.planar) {
      const int64_t channels = images_.channels;
      for (int64_t c = 0; c < channels; ++c) {
        const uint8_t* const from = image(n) + (c * images_.height + row) * images_.width;
        for (int64_t i = 0; i < images_.width; ++i) to[i * channels + c] = from[i] ^ flip;
      }
      return;
    }
    const uint8_t* const from = image(n) + row * inner;
    if (flip == 0) {
      std::memcpy(to, from, static_cast<size_t>(inner));
    } else {
      for (int64_t i = 0; i < inner; ++i) to[i] = from[i] ^ flip;
    }
  }

  const ConvImages& images_;
  int64_t height_, row_bytes_;
  bool copies_;
};

// How many images one call of the kernel takes: small maps leave a tile part empty and read all
// weights for few pixels. Both amount to little at kCallPixels, if the input stays in cache or is
// less than the weights that pass through it.
int64_t images_per_call(const kernels::Conv2dShape& shape, const Source& source) {
  constexpr int64_t kCallPixels = 256;
  constexpr int64_t kCallBytes = 1 << 20;
  const int64_t bytes = std::max(kCallBytes, shape.packed_bytes());
  const int64_t wanted = (kCallPixels + shape.pixels() - 1) / shape.pixels();
  return std::clamp<int64_t>(bytes / source.image_bytes(), 1, wanted);
}

}  // namespace

void run_conv2d(const Conv2dArgs& args, const ConvImages& images, bool depthwise) {
  const kernels::Conv2dShape& shape = args.shape;
  const Source source(images, shape, depthwise);
  const int64_t taps = shape.in_channels * shape.kernel_height * shape.kernel_width;
  const int64_t unit_cost = depthwise ? shape.out_width * shape.groups * taps
                                      : kernels::kTilePixels * kernels::kChannelBlock * taps;
  const int64_t grain = grain_of(kMultiplyGrain, unit_cost);

  const int64_t most = std::min(images_per_call(shape, source), images.batch);
  const int64_t calls = (images.batch + most - 1) / most;
  // The images of call `i`, and the units of so many images.
  const auto images_of = [&](int64_t i) { return std::min(most, images.batch - i * most); };
  const auto units_of = [&](int64_t count) {
    kernels::Conv2dShape several = shape;
    several.images = count;
    return depthwise ? count * shape.out_height : kernels::conv2d_units(several);
  };

  const auto run = [&](int64_t call, const uint8_t* x, int64_t begin, int64_t end) {
    Conv2dArgs own = args;
    own.shape.images = images_of(call);
    own.x = x;
    own.x_image_stride = source.image_bytes();
    own.x_row_stride = source.row_bytes();
    own.x_pixel_stride = images.channels;
    const int64_t skip = call * most * shape.pixels();
    own.y_row_stride = shape.out_width * args.y_pixel_stride;
    own.y_image_stride = shape.out_height * own.y_row_stride;
    own.residual_row_stride = shape.out_width * args.residual_pixel_stride;
    own.residual_image_stride = shape.out_height * own.residual_row_stride;
    const int64_t y_bytes = args.output == kernels::Conv2dOutput::codes ? 1 : sizeof(float);
    own.y = static_cast<uint8_t*>(args.y) + skip * args.y_pixel_stride * y_bytes;
    if (args.residual != nullptr) {
      own.residual = static_cast<const uint8_t*>(args.residual) + skip * args.residual_pixel_stride;
    }
    if (depthwise) {
      kernels::conv2d_depthwise(own, begin, end);
    } else {
      kernels::conv2d(own, begin, end);
    }
  };

  // Few calls that need a copy: all threads copy for one, then all compute on it.
  if (source.copies() && calls < at::get_num_threads()) {
    const Scratch scratch(source.copy_bytes(most));
    uint8_t* const copy = scratch.data();
    const int64_t copy_grain = grain_of(kElementGrain, source.row_bytes());
    for (int64_t call = 0; call < calls; ++call) {
      at::parallel_for(
          0, images_of(call) * source.height(), copy_grain,
          [&](int64_t begin, int64_t end) { source.copy_rows(call * most, copy, begin, end); });
      at::parallel_for(0, units_of(images_of(call)), grain,
                       [&](int64_t begin, int64_t end) { run(call, copy, begin, end); });
    }
    return;
  }
  // Else the units of all calls in one region; a thread copies the images that it works on.
  const int64_t units = units_of(most);
  const int64_t all_units = (calls - 1) * units + units_of(images_of(calls - 1));
  at::parallel_for(0, all_units, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(source.copies() ? source.copy_bytes(most) : 0);
    while (begin < end) {
      const int64_t call = begin / units;
      const int64_t first = begin % units;
      const int64_t last = std::min(units, first + end - begin);
      const uint8_t* x = source.image(call * most);
      if (source.copies()) {
        source.copy_rows(call * most, scratch.data(), 0, images_of(call) * source.height());
        x = scratch.data();
      }
      run(call, x, first, last);
      begin += last - first;
    }
  });
}

}  // namespace qtoolkit::ops
