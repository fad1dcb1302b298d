// The depthwise convolution in plain C++, compiled once for every baseline: the including file
// opens the path's namespace and has store_outputs there. No include guard and no includes, on
// purpose.

namespace {

constexpr int64_t kLanes = 32;

// One pixel at `lanes` channels; `lanes` is a constant where the compiler can see it.
inline __attribute__((always_inline)) void depthwise_pixel(const Conv2dArgs& args, int64_t image,
                                                           int64_t row, int64_t column,
                                                           int64_t channel, int64_t lanes) {
  const Conv2dShape& s = args.shape;
  const uint8_t* x = args.x + image * args.x_image_stride +
                     row * s.stride_height * args.x_row_stride +
                     column * s.stride_width * args.x_pixel_stride + channel;
  const int8_t* w = args.packed + channel;
  int32_t acc[kLanes];
  for (int64_t lane = 0; lane < lanes; ++lane) acc[lane] = args.offset[channel + lane];
  for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
    const uint8_t* tap = x + ky * s.dilation_height * args.x_row_stride;
    for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        // Exact: 255 * -128 and 255 * 127 fit in 16 bits.
        acc[lane] = wrapping_add(acc[lane], static_cast<int16_t>(tap[lane] * w[lane]));
      }
      tap += s.dilation_width * args.x_pixel_stride;
      w += s.groups;
    }
  }
  store_outputs(args, conv2d_place(args, image, row, column), channel, lanes, acc,
                args.multiplier + channel);
}

}  // namespace

void conv2d_depthwise(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const int64_t whole = s.groups - s.groups % kLanes;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / s.out_height, row = unit % s.out_height;
    for (int64_t column = 0; column < s.out_width; ++column) {
      for (int64_t channel = 0; channel < whole; channel += kLanes) {
        depthwise_pixel(args, image, row, column, channel, kLanes);
      }
      if (whole < s.groups) {
        depthwise_pixel(args, image, row, column, whole, s.groups - whole);
      }
    }
  }
}
