// Winograd's convolution of 3 x 3 taps, F(2 x 2, 3 x 3), in integers: 16 multiplications for four
// outputs instead of 36.
//
//   y = A' [(G g G') * (B' d B)] A      g: 3 x 3 weights, d: 4 x 4 inputs, y: 2 x 2 outputs
//
// With 2 G instead of G all entries are integers: |B' d B| <= 4 * 255 and |4 G g G'| <= 9 * 128 fit
// in 16 bits, and 4 y is exact modulo 2^32.
#pragma once

#include <cstdint>

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// Input channels that are transformed at once.
inline constexpr int64_t kWinogradChannels = 32;

// True if a convolution can be, and is worth being, computed like this.
static inline bool winograd_fits(const Conv2dShape& s) {
  constexpr int64_t kLargestSum = (int64_t{1} << 29) - 1;  // 4 y must fit in 32 bits
  return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 &&
         s.stride_width == 1 && s.dilation_height == 1 && s.dilation_width == 1 &&
         s.in_channels % kWinogradChannels == 0 && s.in_channels * 9 * 255 * 128 <= kLargestSum;
}

}  // namespace qtoolkit::kernels
