#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/cpu/conv2d_block_avx2.h"
#include "kernels/cpu/conv2d_cursor.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avxvnni {
namespace {

using avx2::kBlockVectors;
using avx2::kLanes;

// Twelve accumulators, two weights and the activation.
constexpr int kMostPixels = 6;
constexpr int kVectors = 2;
// Bytes from the weights that are used to those that are fetched: weights of a whole network come
// from far, and the processor would not fetch ahead enough.
constexpr int64_t kAhead = 4096;

// The taps of every output, in the order of the packed weights.
struct Taps {
  int64_t rows, runs, quads;   // quads of a run
  int64_t row_step, run_step;  // bytes of the input
};

// Written out for the reasons given in conv2d_avx512vnni.cpp.
inline __attribute__((always_inline)) void dot(__m256i& acc, __m256i x, __m256i w) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
}
inline __attribute__((always_inline)) __m256i quad_at(const uint8_t* x, int64_t at) {
  __m256i quad;
  asm("vpbroadcastd (%1, %2), %0"
      : "=x"(quad)
      : "r"(x), "r"(at), "m"(*reinterpret_cast<const char(*)[1 << 20]>(x)));
  return quad;
}

// result[pixel * kChannelBlock + lane] of two octets of channels, whose weights and offsets begin
// at w and offset.
template <int kPixels>
void accumulate(const Taps& taps, const uint8_t* const* x, const int8_t* w, const int32_t* offset,
                int32_t* result) {
  __m256i acc[kPixels][kVectors];
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      acc[p][v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offset + v * kLanes));
    }
  }
  for (int64_t row = 0; row < taps.rows; ++row) {
    for (int64_t run = 0; run < taps.runs; ++run) {
      int64_t at = row * taps.row_step + run * taps.run_step;
      const int8_t* const end = w + taps.quads * 4 * kChannelBlock;
      for (; w != end; w += 4 * kChannelBlock, at += 4) {
        const auto* const from = reinterpret_cast<const __m256i*>(w);
        const __m256i first = _mm256_loadu_si256(from), second = _mm256_loadu_si256(from + 1);
        _mm_prefetch(reinterpret_cast<const char*>(w + kAhead), _MM_HINT_T0);
#pragma GCC unroll 6
        for (int p = 0; p < kPixels; ++p) {
          const __m256i quad = quad_at(x[p], at);
          dot(acc[p][0], quad, first);
          dot(acc[p][1], quad, second);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + p * kChannelBlock + v * kLanes),
                          acc[p][v]);
    }
  }
}

using Accumulate = void(const Taps&, const uint8_t* const*, const int8_t*, const int32_t*,
                        int32_t*);
// [pixels - 1]
template <int... kIndices>
constexpr std::array<Accumulate*, kMostPixels> all_accumulate(
    std::integer_sequence<int, kIndices...>) {
  return {accumulate<kIndices + 1>...};
}
constexpr auto kAccumulate = all_accumulate(std::make_integer_sequence<int, kMostPixels>());

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  if (args.layout != Conv2dLayout::quads) return portable::conv2d(args, begin, end);
  const Conv2dShape& s = args.shape;
  const Taps taps = {.rows = s.kernel_height,
                     .runs = s.runs_per_row(),
                     .quads = s.run_quads(),
                     .row_step = s.dilation_height * args.x_row_stride,
                     .run_step = s.dilation_width * args.x_pixel_stride};
  const int64_t block_bytes = taps.rows * taps.runs * taps.quads * 4 * kChannelBlock;
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
    const avx2::Rule rule = avx2::rule_of(args, args.multiplier + block * kChannelBlock,
                                          group * s.out_channels + first_channel, channels);
    avx2::Store* const store = avx2::store_of(args, rule);
    const int8_t* const w = args.packed + block * block_bytes;
    const int32_t* const offset = args.offset + block * kChannelBlock;

    const int64_t block_end = (block + 1) * tiles < end ? (block + 1) * tiles : end;
    const int64_t first_pixel = unit % tiles * kTilePixels;
    const int64_t last_pixel = first_pixel + (block_end - unit) * kTilePixels;
    int64_t pixels = (last_pixel < s.pixels() ? last_pixel : s.pixels()) - first_pixel;
    Cursor<3> cursor(args, first_pixel, group);
    // As few tiles as there can be, of equal size.
    for (int64_t left = (pixels + kMostPixels - 1) / kMostPixels; left > 0; --left) {
      const int count = static_cast<int>((pixels + left - 1) / left);
      pixels -= count;
      cursor.take(count, x, place);
      for (int v = 0; v < kBlockVectors && v * kLanes < channels; v += kVectors) {
        kAccumulate[static_cast<size_t>(count - 1)](taps, x, w + v * 4 * kLanes,
                                                    offset + v * kLanes, acc + v * kLanes);
      }
      store(args, rule, place, acc, count);
    }
    unit = block_end;
  }
}

}  // namespace qtoolkit::kernels::avxvnni
