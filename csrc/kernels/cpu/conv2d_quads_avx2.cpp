#include "kernels/cpu/conv2d_quads_avx2.h"

#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/cpu/conv2d_block_avx2.h"
#include "kernels/cpu/conv2d_cursor.h"

namespace qtoolkit::kernels::avx2 {
namespace {

// Eight accumulators, four weights, two activations, and a register for what comes between.
constexpr int kMostPixels = 4;
constexpr int kVectors = 2;

// Adds a quad's products in 16 bits: even bytes by even ones, odd by odd, so that nothing is
// shuffled. Written out for the reasons given in conv2d_avx2.cpp.
inline __attribute__((always_inline)) void add_products(__m256i& acc, __m256i even_x, __m256i odd_x,
                                                        __m256i even_w, __m256i odd_w) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\t"
      "vpaddd %1, %0, %0\n\t"
      "vpmaddwd %5, %4, %1\n\t"
      "vpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(products)
      : "x"(even_x), "x"(even_w), "x"(odd_x), "x"(odd_w));
}

// result[pixel * kChannelBlock + lane] of two octets of channels, whose weights and offsets begin
// at w and offset.
template <int kPixels>
void accumulate(const Conv2dArgs& args, const uint8_t* const* x, const int8_t* w,
                const int32_t* offset, int32_t* result) {
  const Conv2dShape& s = args.shape;
  const __m256i low_bytes = _mm256_set1_epi16(0xff);
  __m256i acc[kPixels][kVectors];
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      acc[p][v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offset + v * kLanes));
    }
  }
  const int64_t runs = s.runs_per_row();
  for (int64_t row = 0; row < s.kernel_height; ++row) {
    for (int64_t run = 0; run < runs; ++run) {
      int64_t at = row * s.dilation_height * args.x_row_stride +
                   run * s.dilation_width * args.x_pixel_stride;
      const int8_t* const end = w + s.run_quads() * 4 * kChannelBlock;
      for (; w != end; w += 4 * kChannelBlock, at += 4) {
        __m256i even[kVectors], odd[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + v);
          even[v] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
          odd[v] = _mm256_srai_epi16(bytes, 8);
        }
#pragma GCC unroll 4
        for (int p = 0; p < kPixels; ++p) {
          int32_t quad;
          __builtin_memcpy(&quad, x[p] + at, sizeof(quad));
          const __m256i codes = _mm256_set1_epi32(quad);
          const __m256i even_x = _mm256_and_si256(codes, low_bytes);
          const __m256i odd_x = _mm256_srli_epi16(codes, 8);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            add_products(acc[p][v], even_x, odd_x, even[v], odd[v]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + p * kChannelBlock + v * kLanes),
                          acc[p][v]);
    }
  }
}

using Accumulate = void(const Conv2dArgs&, const uint8_t* const*, const int8_t*, const int32_t*,
                        int32_t*);
// [pixels - 1]
template <int... kIndices>
constexpr std::array<Accumulate*, kMostPixels> all_accumulate(
    std::integer_sequence<int, kIndices...>) {
  return {accumulate<kIndices + 1>...};
}
constexpr auto kAccumulate = all_accumulate(std::make_integer_sequence<int, kMostPixels>());

}  // namespace

void quads_conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const int64_t block_bytes =
      s.kernel_height * s.runs_per_row() * s.run_quads() * 4 * kChannelBlock;
  const int64_t tiles = conv2d_tiles(s);
  alignas(32) int32_t acc[kMostPixels * kChannelBlock] = {};
  const uint8_t* x[kMostPixels];
  Conv2dPlace place[kMostPixels];
  for (int64_t unit = begin; unit < end;) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t group = block / s.blocks_per_group();
    const int64_t first_channel = block % s.blocks_per_group() * kChannelBlock;
    const int64_t channels_left = s.out_channels - first_channel;
    const int64_t channels = channels_left < kChannelBlock ? channels_left : kChannelBlock;
    const Rule rule = rule_of(args, args.multiplier + block * kChannelBlock,
                              group * s.out_channels + first_channel, channels);
    Store* const store = store_of(args, rule);
    const int8_t* const w = args.packed + block * block_bytes;
    const int32_t* const offset = args.offset + block * kChannelBlock;

    const int64_t block_end = (block + 1) * tiles < end ? (block + 1) * tiles : end;
    const int64_t first_pixel = unit % tiles * kTilePixels;
    const int64_t last_pixel = first_pixel + (block_end - unit) * kTilePixels;
    int64_t pixels = (last_pixel < s.pixels() ? last_pixel : s.pixels()) - first_pixel;
    Cursor<kMostPixels> cursor(args, first_pixel, group);
    while (pixels > 0) {
      const int count = static_cast<int>(pixels < kMostPixels ? pixels : kMostPixels);
      pixels -= count;
      cursor.take(count, x, place);
      for (int v = 0; v < kBlockVectors && v * kLanes < channels; v += kVectors) {
        kAccumulate[static_cast<size_t>(count - 1)](args, x, w + v * 4 * kLanes,
                                                    offset + v * kLanes, acc + v * kLanes);
      }
      store(args, rule, place, acc, count);
    }
    unit = block_end;
  }
}

}  // namespace qtoolkit::kernels::avx2
