#include <algorithm>

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

void pack_conv2d_weight(const Conv2dShape& shape, const int8_t* weight, int8_t* packed) {
  const Conv2dShape& s = shape;
  std::fill_n(packed, s.packed_bytes(), int8_t{0});
  const int64_t taps_per_run = s.kernel_width / s.runs_per_row();
  for (int64_t group = 0; group < s.groups; ++group) {
    for (int64_t channel = 0; channel < s.out_channels; ++channel) {
      const int8_t* from = weight + (group * s.out_channels + channel) * s.in_channels *
                                        s.kernel_height * s.kernel_width;
      const int64_t block = group * s.blocks_per_group() + channel / kChannelBlock;
      const int64_t lane = channel % kChannelBlock;
      for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
        for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
          const int64_t run = (block * s.kernel_height + ky) * s.runs_per_row() + kx / taps_per_run;
          for (int64_t i = 0; i < s.in_channels; ++i) {
            const int64_t byte = kx % taps_per_run * s.in_channels + i;
            const int64_t quad = run * s.run_quads() + byte / 4;
            packed[(quad * kChannelBlock + lane) * 4 + byte % 4] =
                from[(i * s.kernel_height + ky) * s.kernel_width + kx];
          }
        }
      }
    }
  }
}

void pack_conv2d_depthwise_weight(const Conv2dShape& shape, const int8_t* weight, int8_t* packed) {
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  for (int64_t channel = 0; channel < shape.groups; ++channel) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      packed[tap * shape.groups + channel] = weight[channel * taps + tap];
    }
  }
}

}  // namespace qtoolkit::kernels
