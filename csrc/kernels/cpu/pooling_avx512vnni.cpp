// 64 channels at a time, a shorter rest with masks.
#include <immintrin.h>

#include <cstdint>

#include "kernels/pooling.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int64_t kChannels = 64;

__mmask64 first(int64_t count) {
  return count >= kChannels ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// Calls pixel(x, i, j, y, mask) for every output pixel and block of channels; x is the image at the
// block's first channel.
template <class Args, class Pixel>
void for_each_block(const Args& args, int64_t begin, int64_t end, Pixel pixel) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const uint8_t* x = args.x + n * args.x_image_stride;
    uint8_t* y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    for (int64_t j = 0; j < args.out_width; ++j, y += args.channels) {
      for (int64_t c = 0; c < args.channels; c += kChannels) {
        pixel(x + c, i, j, y + c, first(args.channels - c));
      }
    }
  }
}

template <bool kSigned>
void max_pool2d_codes(const MaxPool2dArgs args, int64_t begin, int64_t end) {
  const int64_t pixel = args.channels, row_stride = args.x_row_stride;
  const int64_t row_step = args.row_step * row_stride, column_step = args.column_step * pixel;
  for_each_block(
      args, begin, end, [=](const uint8_t* x, int64_t i, int64_t j, uint8_t* y, __mmask64 mask) {
        const int64_t row_bytes = (args.column_end[j] - args.column_begin[j]) * pixel;
        const uint8_t* row = x + args.row_begin[i] * row_stride + args.column_begin[j] * pixel;
        const uint8_t* end_row = x + args.row_end[i] * row_stride + args.column_begin[j] * pixel;
        __m512i largest = _mm512_set1_epi8(kSigned ? -128 : 0);
        for (; row < end_row; row += row_step) {
          for (int64_t at = 0; at < row_bytes; at += column_step) {
            const __m512i tap = _mm512_maskz_loadu_epi8(mask, row + at);
            largest = kSigned ? _mm512_max_epi8(largest, tap) : _mm512_max_epu8(largest, tap);
          }
        }
        _mm512_mask_storeu_epi8(y, mask, largest);
      });
}

// round_to_code for 16 sums.
struct Output {
  __m512 multiplier, low, high;
  __m512i zero_point;

  __m128i operator()(__m512i sum) const {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier);
    const __mmask16 not_nan = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    value = _mm512_max_ps(_mm512_maskz_mov_ps(not_nan, value), low);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(value, high));
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero_point));
  }
};

template <bool kSigned>
void avg_pool2d_codes(const AvgPool2dArgs args, int64_t begin, int64_t end) {
  const int64_t pixel = args.channels, row_stride = args.x_row_stride;
  for_each_block(
      args, begin, end, [=](const uint8_t* x, int64_t i, int64_t j, uint8_t* y, __mmask64 mask) {
        const int64_t column_begin = args.column_begin[j], column_end = args.column_end[j];
        const int64_t taps = (args.row_end[i] - args.row_begin[i]) * (column_end - column_begin);
        const int64_t divisor = args.row_divisor[i] * args.column_divisor[j];
        const double multiplier = args.multiplier / static_cast<double>(divisor);
        const Output output = {_mm512_set1_ps(static_cast<float>(multiplier)),
                               _mm512_set1_ps(static_cast<float>(args.lo - args.zero_point)),
                               _mm512_set1_ps(static_cast<float>(args.hi - args.zero_point)),
                               _mm512_set1_epi32(args.zero_point)};
        const __m512i start = _mm512_set1_epi32(-args.x_zero_point * static_cast<int32_t>(taps));
        __m512i sum[4] = {start, start, start, start};
        const int64_t row_bytes = (column_end - column_begin) * pixel;
        const uint8_t* row = x + args.row_begin[i] * row_stride + column_begin * pixel;
        const uint8_t* end_row = x + args.row_end[i] * row_stride + column_begin * pixel;
        for (; row < end_row; row += row_stride) {
          for (int64_t at = 0; at < row_bytes; at += pixel) {
            for (int k = 0; k < 4; ++k) {
              const __mmask16 part = static_cast<__mmask16>(mask >> (16 * k));
              const __m128i bytes = _mm_maskz_loadu_epi8(part, row + at + 16 * k);
              sum[k] = _mm512_add_epi32(
                  sum[k], kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
            }
          }
        }
        for (int k = 0; k < 4; ++k) {
          const __mmask16 part = static_cast<__mmask16>(mask >> (16 * k));
          _mm_mask_storeu_epi8(y + 16 * k, part, output(sum[k]));
        }
      });
}

}  // namespace

void max_pool2d(const MaxPool2dArgs& args, int64_t begin, int64_t end) {
  args.is_signed ? max_pool2d_codes<true>(args, begin, end)
                 : max_pool2d_codes<false>(args, begin, end);
}

void avg_pool2d(const AvgPool2dArgs& args, int64_t begin, int64_t end) {
  args.x_signed ? avg_pool2d_codes<true>(args, begin, end)
                : avg_pool2d_codes<false>(args, begin, end);
}

}  // namespace qtoolkit::kernels::avx512vnni
