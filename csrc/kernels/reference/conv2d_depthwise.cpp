#include <vector>

#include "kernels/conv2d_output.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::reference {

void conv2d_depthwise(const Conv2dArgs& given, int64_t begin, int64_t end) {
  const Conv2dShape& s = given.shape;
  Conv2dArgs args = given;
  std::vector<int8_t> unpacked;
  if (args.weight == nullptr) {
    unpacked.resize(static_cast<size_t>(s.weights()));
    unpack_conv2d_depthwise_weight(s, args.packed, unpacked.data());
    args.weight = unpacked.data();
  }
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / s.out_height, row = unit % s.out_height;
    for (int64_t column = 0; column < s.out_width; ++column) {
      for (int64_t channel = 0; channel < s.groups; ++channel) {
        const int8_t* w = args.weight + channel * s.kernel_height * s.kernel_width;
        int32_t acc = args.offset[channel];
        for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
          for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
            const int64_t y = row * s.stride_height + ky * s.dilation_height;
            const int64_t x = column * s.stride_width + kx * s.dilation_width;
            const uint8_t code = args.x[image * args.x_image_stride + y * args.x_row_stride +
                                        x * args.x_pixel_stride + channel];
            acc = wrapping_add(acc, int32_t{code} * *w++);
          }
        }
        store_conv2d_output(args, conv2d_place(args, image, row, column), channel, acc,
                            args.multiplier[channel]);
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
