// Walks over output pixels. Everything is internal: files of different instruction sets include it.
#pragma once

#include "kernels/conv2d_input.h"
#include "kernels/conv2d_output.h"

namespace qtoolkit::kernels {
namespace {

// An output pixel and its input, without divisions from one to the next: between tiles their
// latency would show. `group` is the one whose input is wanted.
template <int kChunk>
class Cursor {
 public:
  Cursor(const Conv2dArgs& args, int64_t pixel, int64_t group)
      : width_(args.shape.out_width),
        height_(args.shape.out_height),
        column_(pixel % width_),
        line_(pixel / width_ % height_),
        step_{args.shape.stride_width * args.x_pixel_stride, args.y_pixel_stride,
              args.residual_pixel_stride},
        row_step_{args.shape.stride_height * args.x_row_stride, args.y_row_stride,
                  args.residual_row_stride},
        image_step_{args.x_image_stride - height_ * row_step_.x,
                    args.y_image_stride - height_ * row_step_.y,
                    args.residual_image_stride - height_ * row_step_.residual} {
    const Conv2dPlace place = conv2d_place(args, pixel);
    at_ = {conv2d_input(args, pixel) - args.x, place.y, place.residual};
    row_ = {at_.x - column_ * step_.x, at_.y - column_ * step_.y,
            at_.residual - column_ * step_.residual};
    x_ = args.x + group * args.shape.in_channels;
  }

  // Writes the first taps and the places of the next `count` pixels, kChunk at once where they lie
  // in one row. Loops of fixed length and conditional moves: with runs as long as the row allows,
  // mispredicted branches took up to a tenth of the time of layers with few taps.
  void take(int count, const uint8_t** x, Conv2dPlace* place) {
    while (count > 0) {
      const int taken = count >= kChunk && width_ - column_ >= kChunk ? kChunk : 1;
      if (taken == 1) {
        write<1>(x, place);
      } else {
        write<kChunk>(x, place);
      }
      x += taken;
      place += taken;
      count -= taken;
      advance(taken);
    }
  }

 private:
  struct Position {  // of the input, the output and the residual
    int64_t x, y, residual;
  };
  // Keeps GCC from computing addresses in vector registers: that takes the ports of multiply-adds,
  // and cost as much time as sixty of them for every tile.
  static int64_t scalar(int64_t value) {
    asm("" : "+r"(value));
    return value;
  }
  static Position choose(bool first, Position a, Position b) {
    return {scalar(first ? a.x : b.x), scalar(first ? a.y : b.y),
            scalar(first ? a.residual : b.residual)};
  }
  static Position plus(Position a, int64_t count, Position step) {
    return {scalar(a.x + count * step.x), scalar(a.y + count * step.y),
            scalar(a.residual + count * step.residual)};
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

  int64_t width_, height_, column_, line_;
  Position step_, row_step_;
  Position image_step_;  // from the end of an image's last row to the next image
  Position at_, row_;
  const uint8_t* x_;
};

}  // namespace
}  // namespace qtoolkit::kernels
