#include <immintrin.h>

#include "kernels/conv2d_input.h"
#include "kernels/cpu/conv2d_output_avx2.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx2 {
namespace {

// Eight channels at a time, as 16-bit products that vpmaddwd adds in pairs: 255 * 127 twice fits in
// 32 bits, where vpmaddubsw would saturate. So a channel has two partial sums, added at the end.
constexpr int kLanes = 8;
constexpr int kOctets = static_cast<int>(kChannelBlock) / kLanes;

// The sums of eight channels at kPixels pixels; acc[p * kChannelBlock + lane]. w points to the
// eight channels' bytes of the first quad.
template <int kPixels>
void accumulate(const Conv2dArgs& args, const uint8_t* const* pixels, const int8_t* w,
                const int32_t* offset, int32_t* acc) {
  const Conv2dShape& s = args.shape;
  const int64_t runs = s.runs_per_row();
  const int64_t run_bytes = s.run_quads() * 4;
  __m256i low[kPixels], high[kPixels];  // four channels each
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) low[p] = high[p] = _mm256_setzero_si256();
  for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t first =
          ky * s.dilation_height * args.x_row_stride + run * s.dilation_width * args.x_pixel_stride;
      const uint8_t* x[kPixels];
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; ++p) x[p] = pixels[p] + first;
      for (int64_t i = 0; i < run_bytes; i += 4, w += 4 * kChannelBlock) {
        const __m128i* bytes = reinterpret_cast<const __m128i*>(w);
        const __m256i w_low = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes));
        const __m256i w_high = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1));
#pragma GCC unroll 4
        for (int p = 0; p < kPixels; ++p) {
          int32_t quad;
          __builtin_memcpy(&quad, x[p] + i, 4);
          const __m256i codes =
              _mm256_unpacklo_epi8(_mm256_set1_epi32(quad), _mm256_setzero_si256());
          low[p] = _mm256_add_epi32(low[p], _mm256_madd_epi16(codes, w_low));
          high[p] = _mm256_add_epi32(high[p], _mm256_madd_epi16(codes, w_high));
        }
      }
    }
  }
  const __m256i start = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offset));
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
    // The horizontal sum leaves channels 0 1 4 5 2 3 6 7.
    const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[p], high[p]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + p * kChannelBlock),
                        _mm256_add_epi32(sums, start));
  }
}

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const int64_t tiles = conv2d_tiles(s);
  const int64_t block_bytes =
      s.kernel_height * s.runs_per_row() * s.run_quads() * 4 * kChannelBlock;
  int32_t acc[kTilePixels * kChannelBlock];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t group = block / s.blocks_per_group();
    const int64_t first_channel = block % s.blocks_per_group() * kChannelBlock;
    const int64_t channels_left = s.out_channels - first_channel;
    const int64_t channels = channels_left < kChannelBlock ? channels_left : kChannelBlock;
    const int64_t first_pixel = unit % tiles * kTilePixels;
    const int64_t pixels_left = s.pixels() - first_pixel;
    const int64_t pixels = pixels_left < kTilePixels ? pixels_left : kTilePixels;

    const uint8_t* x[kTilePixels];
    for (int64_t p = 0; p < pixels; ++p) {
      x[p] = conv2d_input(args, first_pixel + p) + group * s.in_channels;
    }
    for (int octet = 0; octet < kOctets && octet * kLanes < channels; ++octet) {
      const int64_t lane = octet * kLanes;
      const int8_t* w = args.packed + block * block_bytes + lane * 4;
      const int32_t* offset = args.offset + block * kChannelBlock + lane;
      for (int64_t p = 0; p < pixels;) {
        int32_t* to = acc + p * kChannelBlock + lane;
        const int64_t left = pixels - p;
        // A whole tile is 4 + 3 pixels.
        if (left >= 4) {
          accumulate<4>(args, x + p, w, offset, to), p += 4;
        } else if (left == 3) {
          accumulate<3>(args, x + p, w, offset, to), p += 3;
        } else {
          accumulate<1>(args, x + p, w, offset, to), p += 1;
        }
      }
    }
    for (int64_t p = 0; p < pixels; ++p) {
      store_outputs(args, conv2d_place(args, first_pixel + p),
                    group * s.out_channels + first_channel, channels, acc + p * kChannelBlock,
                    args.multiplier + block * kChannelBlock);
    }
  }
}

}  // namespace qtoolkit::kernels::avx2
