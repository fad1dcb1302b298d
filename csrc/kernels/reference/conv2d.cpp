#include <algorithm>
#include <vector>

#include "kernels/conv2d_output.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::reference {
namespace {

int32_t accumulate(const Conv2dArgs& args, int64_t pixel, int64_t group, int64_t channel) {
  const Conv2dShape& s = args.shape;
  const int64_t image = pixel / (s.out_height * s.out_width);
  const int64_t row = pixel / s.out_width % s.out_height * s.stride_height;
  const int64_t column = pixel % s.out_width * s.stride_width;
  const int8_t* w = args.weight + (group * s.out_channels + channel) * s.in_channels *
                                      s.kernel_height * s.kernel_width;
  int32_t sum = 0;
  for (int64_t i = 0; i < s.in_channels; ++i) {
    for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
      for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
        const uint8_t code = args.x[image * args.x_image_stride +
                                    (row + ky * s.dilation_height) * args.x_row_stride +
                                    (column + kx * s.dilation_width) * args.x_pixel_stride +
                                    group * s.in_channels + i];
        sum = wrapping_add(sum, int32_t{code} * *w++);
      }
    }
  }
  return sum;
}

}  // namespace

void conv2d(const Conv2dArgs& given, int64_t begin, int64_t end) {
  const Conv2dShape& s = given.shape;
  Conv2dArgs args = given;
  std::vector<int8_t> unpacked;
  if (args.weight == nullptr) {
    unpacked.resize(static_cast<size_t>(s.weights()));
    unpack_conv2d_weight(args.layout, s, args.packed, unpacked.data());
    args.weight = unpacked.data();
  }
  const int64_t tiles = conv2d_tiles(s);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t group = block / s.blocks_per_group();
    const int64_t first_channel = block % s.blocks_per_group() * kChannelBlock;
    const int64_t channels = std::min(kChannelBlock, s.out_channels - first_channel);
    const int64_t first_pixel = unit % tiles * kTilePixels;
    const int64_t last_pixel = std::min(first_pixel + kTilePixels, s.pixels());
    for (int64_t pixel = first_pixel; pixel < last_pixel; ++pixel) {
      const Conv2dPlace place = conv2d_place(args, pixel);
      for (int64_t lane = 0; lane < channels; ++lane) {
        const int64_t padded = block * kChannelBlock + lane;
        const int64_t channel = first_channel + lane;
        const int32_t acc =
            wrapping_add(args.offset[padded], accumulate(args, pixel, group, channel));
        store_conv2d_output(args, place, group * s.out_channels + channel, acc,
                            args.multiplier[padded]);
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
