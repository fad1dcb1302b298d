// Which output pixels a tile of the AVX-512 convolution holds, where they lie and where their input
// does. Everything is internal.
#pragma once

#include "kernels/conv2d_input.h"
#include "kernels/conv2d_output.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// Two units of work at once, where there are two.
constexpr int kMostPixels = 2 * static_cast<int>(kTilePixels);
static_assert(kMostPixels == 14);

// A place in the input, the output and the residual, in elements from the first tap or pixel.
struct Position {
  int64_t x, y, residual;
};

// Up to kMostPixels output pixels.
struct Tile {
  int pixels;
  int64_t ahead;  // where weights are asked for, in bytes from those that are used
  // True if they are runs of kTilePixels pixels, each within a row. Then only the runs' first
  // pixels are given, else all.
  bool in_runs;
  Position run[2];
  const uint8_t* x[kMostPixels];
  Conv2dPlace place[kMostPixels];
};

// Keeps GCC from computing addresses in vector registers, on whose ports the multiply-adds are.
inline int64_t scalar(int64_t value) {
  asm("" : "+r"(value));
  return value;
}

// Goes through output pixels without divisions from one to the next, whose latency would show
// between tiles.
class Cursor {
 public:
  // `group` is the one whose input is wanted.
  Cursor(const Conv2dArgs& args, int64_t pixel, int64_t group)
      : width_(args.shape.out_width),
        height_(args.shape.out_height),
        step_{args.shape.stride_width * args.x_pixel_stride, args.y_pixel_stride,
              args.residual_pixel_stride},
        row_step_{args.shape.stride_height * args.x_row_stride, args.y_row_stride,
                  args.residual_row_stride},
        image_step_{args.x_image_stride - height_ * row_step_.x,
                    args.y_image_stride - height_ * row_step_.y,
                    args.residual_image_stride - height_ * row_step_.residual} {
    x_ = args.x + group * args.shape.in_channels;
    if (pixel == 0) return;
    const Conv2dPlace place = conv2d_place(args, pixel);
    column_ = pixel % width_;
    line_ = pixel / width_ % height_;
    at_ = {conv2d_input(args, pixel) - args.x, place.y, place.residual};
    row_ = plus(at_, -column_, step_);
  }

  // The next `pixels` pixels; as runs only if `runs_wanted`.
  void take(int pixels, bool runs_wanted, Tile& tile) {
    tile.pixels = pixels;
    tile.in_runs = runs_wanted && take_runs(pixels, tile);
    if (tile.in_runs) return;
    const uint8_t** x = tile.x;
    Conv2dPlace* place = tile.place;
    // Loops of fixed length and conditional moves: with runs as long as the row allows,
    // mispredicted branches took up to a tenth of the time of layers with few taps.
    for (int left = pixels; left > 0;) {
      const int taken = left >= kTilePixels && run_fits() ? kTilePixels : 1;
      if (taken == 1) {
        write<1>(x, place);
      } else {
        write<kTilePixels>(x, place);
      }
      x += taken;
      place += taken;
      left -= taken;
      advance(taken);
    }
  }

  const uint8_t* x() const { return x_; }

 private:
  static Position choose(bool first, Position a, Position b) {
    return {scalar(first ? a.x : b.x), scalar(first ? a.y : b.y),
            scalar(first ? a.residual : b.residual)};
  }
  static Position plus(Position a, int64_t count, Position step) {
    return {scalar(a.x + count * step.x), scalar(a.y + count * step.y),
            scalar(a.residual + count * step.residual)};
  }

  bool run_fits() const { return width_ - column_ >= kTilePixels; }

  bool take_runs(int pixels, Tile& tile) {
    const bool two = pixels == kMostPixels;
    if ((!two && pixels != kTilePixels) || !run_fits()) return false;
    const Cursor start = *this;
    tile.run[0] = at_;
    advance(kTilePixels);
    if (!two) return true;
    if (!run_fits()) {
      *this = start;
      return false;
    }
    tile.run[1] = at_;
    advance(kTilePixels);
    return true;
  }

  template <int kCount>
  void write(const uint8_t** x, Conv2dPlace* place) const {
    Position at = at_;
    for (int p = 0; p < kCount; ++p, at = plus(at, 1, step_)) {
      x[p] = x_ + at.x;
      place[p] = {at.y, at.residual};
    }
  }

  // By pixels of one row.
  void advance(int pixels) {
    column_ += pixels;
    const bool row_ends = column_ == width_;
    column_ = row_ends ? 0 : column_;
    line_ += row_ends;
    row_ = choose(row_ends, plus(row_, 1, row_step_), row_);
    const bool image_ends = line_ == height_;
    line_ = image_ends ? 0 : line_;
    row_ = choose(image_ends, plus(row_, 1, image_step_), row_);
    at_ = choose(row_ends, row_, plus(at_, pixels, step_));
  }

  int64_t width_, height_, column_ = 0, line_ = 0;
  Position step_, row_step_;
  Position image_step_;    // from the end of an image's last row to the next image
  Position at_{}, row_{};  // of this pixel and of the first in its row
  const uint8_t* x_;
};

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
